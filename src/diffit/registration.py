"""After ``import diffit``, diffusers knows our classes, though it is imported only if somebody else imports it.

``DiffusionPipeline.from_pretrained(folder)`` takes the pipeline's class from diffusers' own names and its parts from
modules that the program has imported already. So :mod:`diffit.pipeline`, which adds the name, has to be imported with
diffusers' pipelines, whichever of ``import diffit`` and ``import diffusers`` comes first.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

WATCHED = "diffusers.pipelines.pipeline_utils"  # the module of DiffusionPipeline


def register() -> None:
    """Import :mod:`diffit.pipeline` now, or as soon as diffusers' pipelines are imported."""
    if WATCHED in sys.modules:
        importlib.import_module("diffit.pipeline")
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(importlib.abc.MetaPathFinder):
    """Finds one module, as the other finders do, and adds a line to the end of its execution."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("diffit.pipeline")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
