"""DiffiT: diffusion vision transformers (arXiv 2312.02139)."""

__version__ = "0.1.0"
