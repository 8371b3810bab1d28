"""Any decoded image as upright 8-bit gray or RGB in sRGB."""

import io
import re
import sys
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, ImageColor, ImageFile

from diffit.errors import UserError

GRAY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"})
TURNS = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FULL = (0.0, 65535.0)
WHITE = (255, 255, 255)
SAME = 3  # levels: profiles of sRGB itself differ by so much in their rounding
_OTHER_ORDER = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}

Values = npt.NDArray[Any]
Color = tuple[int, int, int]


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 as well when the EXIF block is missing or damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # photographs with a malformed EXIF block are common, and their pixels are fine
        return 1
    return value if value in range(1, 9) else 1


def color(text: str | Color) -> Color:
    """``white``, ``#RRGGBB`` or ``R,G,B`` as three levels."""
    try:
        if isinstance(text, str) and text.count(",") == 2 and "(" not in text:
            text = f"rgb({text})"
        red, green, blue = ImageColor.getrgb(text)[:3] if isinstance(text, str) else text
    except ValueError:
        raise UserError(f"background {text!r} is not a colour: use white, black, #RRGGBB or R,G,B") from None
    return red, green, blue


def color_name(levels: Color) -> str:
    return {WHITE: "white", (0, 0, 0): "black"}.get(levels) or ",".join(map(str, levels))


def is_sixteen_bit_color(image: Image.Image) -> bool:
    """Whether Pillow would keep only the upper byte of each value; asked before the pixels are loaded.

    Not of gray with transparency, for which it has no raw mode that reads the lower byte: such images have 8 bits.
    """
    return (
        isinstance(image, ImageFile.ImageFile)
        and image.mode in ("RGB", "RGBA")
        and any(re.fullmatch("RGB.*16.", _raw_mode(tile)) for tile in image.tile)
    )


def _raw_mode(tile: Any) -> str:
    args = tile[3]  # a plain tuple before Pillow 11
    return str(args if isinstance(args, str) else args[0] if args else "")


def sixteen_bit_color(image: Image.Image, again: Image.Image) -> Values:
    """uint16 (H, W, 3 or 4) from the same file opened twice, of which nothing is loaded yet.

    Pillow has no such mode and reads the upper bytes; told the other byte order, it reads the lower ones.
    """
    assert isinstance(again, ImageFile.ImageFile)
    tiles: list[Any] = []
    for tile in again.tile:
        raw, args = _raw_mode(tile), tile[3]
        raw = raw[:-3] + _OTHER_ORDER[raw[-3:]]
        new = *tile[:3], raw if isinstance(args, str) else (raw, *(args or ())[1:])
        tiles.append(type(tile)(*new) if hasattr(tile, "_fields") else new)
    again.tile = tiles
    values: Values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(again)
    return values


def gray_values(image: Image.Image, defined: bool = False) -> Values | None:
    """(H, W) of a gray image with more than 8 bits, else None. ``defined``: the range of 32-bit values is known."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return np.asarray(image).astype(np.uint16)
    if image.mode not in ("I", "F"):
        return None
    if not defined:
        raise ValueError("it has 32-bit pixels without a defined white; pass --range LOW,HIGH")
    return np.asarray(image)


def scale(values: Values, value_range: tuple[float, float]) -> Image.Image:
    """8 bits of values of which the lower and everything below becomes 0, the higher and all above 255.

    Transparency, the fourth channel, has all 16 bits whatever the range of the colours.
    """
    low, high = np.array(value_range)[:, None] if values.ndim < 3 else np.array([*[value_range] * 3, FULL]).T
    channels = values.shape[2] if values.ndim == 3 else 1
    levels = np.rint((values.astype(np.float64) - low[:channels]) * 255 / (high - low)[:channels])
    return Image.fromarray(np.nan_to_num(levels).clip(0, 255).astype(np.uint8))


def eight_bit(
    image: Image.Image,
    mode: str,
    *,
    values: Values | None = None,
    value_range: tuple[float, float] = FULL,
    background: Color = WHITE,
) -> tuple[Image.Image, set[str]]:
    """``image`` as upright 8-bit ``mode``, ``L`` or ``RGB``, and what was done: ``profile``, ``transparent``.

    ``values``, with more than 8 bits, stand for the image's own; they are scaled from ``value_range``. An embedded
    colour profile is converted to sRGB, transparency laid on ``background``.
    Raises ValueError for a colour mode that cannot be converted.
    """
    image.load()  # which turns a TIFF upright, and says so
    turn, profile, done = TURNS.get(orientation(image)), image.info.get("icc_profile"), set[str]()
    if values is not None:
        image = scale(values, value_range)
    gray = image.mode in GRAY_MODES
    alpha = None
    if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    transform = _to_srgb(profile, image.mode == "CMYK", gray) if profile else None
    try:
        if image.mode == "LAB":
            image = ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), _srgb(), outputMode="RGB") or image
        elif transform is not None:
            image = transform.apply(image.convert(transform.input_mode))
            done.add("profile")
        if alpha is not None:
            if alpha.getextrema()[0] != 255:
                done.add("transparent")
            image = image.convert("RGBA")
            image.putalpha(alpha)
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        image = image.convert(mode)
    except ValueError as error:
        raise ValueError(f"it has the colour mode {image.mode}, which cannot be converted") from error
    return (image if turn is None else image.transpose(turn)), done


def has_other_profile(image: Image.Image) -> bool:
    """Whether an embedded profile says that the pixels are not sRGB."""
    profile = image.info.get("icc_profile")
    return bool(profile) and _to_srgb(profile, image.mode == "CMYK", image.mode in GRAY_MODES) is not None


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@lru_cache(maxsize=64)  # a camera writes the same profile into every file
def _to_srgb(profile: bytes, cmyk: bool, gray: bool) -> ImageCms.ImageCmsTransform | None:
    """None for a profile that is damaged, is for other pixels than these, or is that of sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip())
        if mode is None or (mode == "CMYK") != cmyk or (mode == "L" and not gray):
            return None
        transform = ImageCms.buildTransform(
            source, _srgb(), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if cmyk:
        return transform
    # A profile's name tells little; what it does to a cube of colours tells all.
    cube = np.stack(np.meshgrid(*[np.arange(0, 256, 17, dtype=np.uint8)] * 3), axis=-1).reshape(16, 256, 3)
    probe = Image.fromarray(cube if mode == "RGB" else cube[..., 0])
    moved = np.abs(np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB")))
    return transform if moved.max() > SAME else None
