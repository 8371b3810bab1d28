"""How much one file may ask for, known from its header before anything is allocated for it."""

import os

from PIL import Image

from diffit.errors import UserError

VARIABLE = "DIFFIT_MAX_MEGAPIXELS"
DEFAULT = 64  # of the largest cameras in common use; a PNG of all zeros is a thousandth of what it unfolds to


def max_pixels() -> int:
    """Pixels that one image may have: 64 million, or what the environment says."""
    text = os.environ.get(VARIABLE)
    try:
        megapixels = DEFAULT if text is None else float(text)
        if not 0 < megapixels < 1e6:
            raise ValueError
    except ValueError:
        raise UserError(f"{VARIABLE}={text}: not a number of megapixels; use {DEFAULT}, or a larger one") from None
    return int(megapixels * 1e6)


def max_bytes() -> int:
    """Bytes that one image file may have: those of the largest image with four channels of 16 bits, uncompressed."""
    return 8 * max_pixels()


def require_bytes(size: int, limit: int | None = None) -> None:
    """OSError for a file of more bytes than the ``limit``, None being that of an image."""
    if size > (limit := max_bytes() if limit is None else limit):
        raise OSError(f"{size} bytes unpacked, more than the limit of {limit}")


def require_size(width: int, height: int) -> None:
    """ValueError for an image of more pixels than :func:`max_pixels`."""
    limit = max_pixels()
    if width * height > limit:
        raise ValueError(
            f"{width}x{height} pixels, more than the limit of {limit / 1e6:g} million: it could be a decompression "
            f"bomb, and {VARIABLE}={-(-width * height // 10**6)} would read it"
        )


def lift_pillows_limit() -> None:
    """Pillow refuses twice its own limit whatever ours is; it is lifted only for who asked for more."""
    if VARIABLE in os.environ and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels())
