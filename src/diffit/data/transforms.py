"""How images of any size get to the size of an archive. Sizes are (W, H) in pixels, as in Pillow."""

from collections.abc import Callable

from PIL import Image

from diffit.errors import UserError

Size = tuple[int, int]


def resize(image: Image.Image, size: Size) -> Image.Image:
    """Lanczos, whatever the proportions."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def center_crop(image: Image.Image, size: Size) -> Image.Image:
    """The largest centred part with the proportions of ``size``, resized to it (Lanczos)."""
    scale = min(image.width / size[0], image.height / size[1])
    width, height = (max(1, round(side * scale)) for side in size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return resize(image.crop((left, top, left + width, top + height)), size)


def _bars(image: Image.Image, size: Size) -> Image.Image:
    canvas = Image.new(image.mode, size)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas


def center_crop_letterbox(image: Image.Image, size: Size) -> Image.Image:
    """:func:`center_crop` to (W, H), then black bars above and below to W x W."""
    return _bars(center_crop(image, size), (size[0], size[0]))


def center_crop_wide(image: Image.Image, size: Size) -> Image.Image:
    """As the StyleGAN and EDM tools do it, for the same pixels as theirs.

    All columns and as many rows of the middle as the image would have if it were W wide, resized to (W, H); black bars
    make it W x W. An image wider than W is thereby stretched. Theirs leave out one smaller than (W, H): a ValueError.
    """
    width, height = size
    rows = round(width * image.height / image.width)
    if image.width < width or rows < height:
        raise ValueError(
            f"it is {image.width}x{image.height}, too small for center-crop-wide to {width}x{height}; "
            "center-crop-letterbox enlarges"
        )
    top = (image.height - rows) // 2
    return _bars(resize(image.crop((0, top, image.width, top + rows)), size), (width, width))


def center_crop_dhariwal(image: Image.Image, size: Size) -> Image.Image:
    """ADM's preprocessing (Dhariwal & Nichol 2021): halve by box filter while twice too large, bicubic, crop."""
    side = size[0]
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def pad(image: Image.Image, size: Size) -> Image.Image:
    """Black borders to ``size``, the pixels as they are: 28 x 28 digits to 32 x 32, as EDM's tool does with MNIST."""
    if image.width > size[0] or image.height > size[1]:
        raise ValueError(
            f"it is {image.width}x{image.height}, too large to pad to {size[0]}x{size[1]}; use a larger --resolution"
        )
    return _bars(image, size)


TRANSFORMS: dict[str, Callable[[Image.Image, Size], Image.Image]] = {
    "center-crop": center_crop,
    "center-crop-letterbox": center_crop_letterbox,
    "center-crop-wide": center_crop_wide,
    "center-crop-dhariwal": center_crop_dhariwal,
    "pad": pad,
}


def resizer(resolution: Size | None, transform: str | None) -> Callable[[Image.Image], Image.Image]:
    """What makes every image ``resolution`` large. UserError for a transform that is not known or cannot do so."""
    if transform is not None and transform not in TRANSFORMS:
        raise UserError(f"transform {transform!r} is not known: use one of {', '.join(TRANSFORMS)}")
    if resolution is None:
        if transform is not None:
            raise UserError(f"transform {transform} needs a resolution: add --resolution WxH")
        return lambda image: image
    width, height = resolution
    if width < 1 or height < 1:
        raise UserError(f"resolution {width}x{height} is not possible: use two numbers of pixels, 1 or more")
    if transform == "center-crop-dhariwal" and width != height:
        raise UserError(f"center-crop-dhariwal makes squares, not {width}x{height}: use center-crop or a square size")
    if transform in ("center-crop-wide", "center-crop-letterbox") and width < height:
        raise UserError(f"{transform} makes wide images, not {width}x{height}: use center-crop or a wider size")
    change = TRANSFORMS[transform] if transform else resize
    return lambda image: change(image, resolution)
