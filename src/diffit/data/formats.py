"""Which files are images that can be read, and what to do about those that cannot."""

from collections import Counter
from collections.abc import Sequence

from PIL import features

from diffit.errors import install_hint

# A named list keeps out decoders that start other programs or are seldom looked at (EPS, WMF, ...).
FORMATS: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
IMAGE_SUFFIXES: tuple[str, ...] = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm",
    ".jp2", ".j2k",
)  # fmt: skip
UNREAD: dict[str, tuple[str, str]] = {}  # suffix -> (what such files are, what makes them readable)


def _suffixes(text: str, kind: str, remedy: str) -> None:
    UNREAD.update(dict.fromkeys(text.split(), (kind, remedy)))


_suffixes(
    ".cr2 .cr3 .crw .nef .nrw .arw .sr2 .dng .raf .rw2 .orf .pef .srw .3fr .iiq .x3f",
    "RAW photographs",
    "export them as TIFF or JPEG from a RAW converter",
)
_suffixes(".jxl", "JPEG XL images", "convert them to PNG with djxl")
_suffixes(".psd .xcf .kra .svg .exr .hdr", "images of editing programs", "export them as PNG")
_suffixes(".mp4 .mov .avi .mkv .webm", "videos", "extract their frames, e.g. ffmpeg -i VIDEO frames/%06d.png")
_suffixes(".dcm", "DICOM images", "export them as 16-bit PNG")

if "avif" in features.get_supported_modules():
    FORMATS += ("AVIF",)
    IMAGE_SUFFIXES += (".avif",)
else:
    _suffixes(".avif", "AVIF images", "pip install 'pillow>=11.3'")
try:
    import pillow_heif
except ImportError:
    _suffixes(".heic .heif .hif", "HEIC photographs", install_hint("data"))
else:
    pillow_heif.register_heif_opener()
    FORMATS += ("HEIF",)
    IMAGE_SUFFIXES += (".heic", ".heif", ".hif")


def suffix_of(name: str) -> str:
    """``.png`` of ``a/b.PNG``; the name itself where it has none."""
    base = name.rsplit("/", 1)[-1]
    return "." + base.rsplit(".", 1)[1].lower() if "." in base[1:] else base


def unread(names: Sequence[str]) -> list[str]:
    """``313 HEIC photographs (pip install pillow-heif)``, for each kind of image among ``names`` that is not read."""
    kinds = Counter(UNREAD[suffix] for suffix in map(suffix_of, names) if suffix in UNREAD)
    return [f"{count} {kind} ({remedy})" for (kind, remedy), count in kinds.most_common()]
