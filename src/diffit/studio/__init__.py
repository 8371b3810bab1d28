"""A page where models are tried, looked into and watched: what :mod:`diffit.explore` does, behind Gradio."""

from diffit.studio.shelf import Shelf

__all__ = ["Shelf"]
