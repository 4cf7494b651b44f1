"""Pictures: files are checked before they are used, upright RGB when they are read; pages are drawn."""

from PIL import Image, UnidentifiedImageError

from megatron_eagle.data.media import hints
from megatron_eagle.data.media.damage import jpeg_warning, png_damage
from megatron_eagle.data.media.documents import draw_page
from megatron_eagle.data.media.source import open_bytes, open_media, page_ref
from megatron_eagle.hf_model.pictures import check_scale, open_picture, orientation, to_rgb
from megatron_eagle.problems import Problem

DEFAULT_MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: 9459 x 9459
MAX_MAX_PIXELS = 2 * DEFAULT_MAX_PIXELS  # where Pillow itself refuses to open a picture


def image_size(
    path: str, *, max_pixels: int = DEFAULT_MAX_PIXELS, strict_jpeg: bool = False
) -> tuple[int, int]:
    """Width and height of a picture as it is shown, after checking that all of it can be decoded.

    Args:
        strict_jpeg: also refuse a JPEG file that libjpeg warns of.

    Raises:
        Problem: the file is missing, empty, broken, cut off or larger than `max_pixels`, or has values
            without a known scale.
    """
    image = _open(path, max_pixels)
    if strict_jpeg and (warning := jpeg_warning(_content(path))):
        raise Problem("doubtful image", f"{path}: libjpeg warns: {warning}")
    # A JPEG decoded at an eighth of its size is read to its end, which is all that the check needs.
    whole = image.size
    image.draft(None, (whole[0] // 8, whole[1] // 8))
    drafted = image.size != whole
    _decode(image, path)
    try:
        check_scale(image)
    except ValueError as error:
        raise Problem("unreadable image", f"{path}: {error}") from None
    size = whole if drafted else image.size
    return size[::-1] if orientation(image) in (5, 6, 7, 8) else size


def load_image(path: str, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """An upright RGB picture (the first one of an animation), alpha laid over white; or a page of a document.

    `path` may be any name that `source` knows.

    Raises:
        Problem: as `image_size`.
    """
    if page := page_ref(path):
        return draw_page(page, max_pixels=max_pixels)
    image = _open(path, max_pixels)
    _decode(image, path)
    try:
        return to_rgb(image)
    except ValueError as error:
        raise Problem("unreadable image", f"{path}: {error}") from None


def _open(path: str, max_pixels: int) -> Image.Image:
    source = open_media(path)
    try:
        image = open_picture(source)
    except Image.DecompressionBombError:
        raise Problem("image too large", f"{path} (more than {max_pixels} pixels)") from None
    except UnidentifiedImageError:
        hint = hints.of_content(_content(path)[:64])
        raise Problem("unreadable image", f"{path} is no picture of a known format{hint}") from None
    except Exception as error:  # broken headers raise almost anything: OSError, SyntaxError, struct.error
        raise Problem("unreadable image", f"{path}: {error}") from None
    if image.width * image.height > max_pixels:
        image.close()
        raise Problem(
            "image too large", f"{path} has {image.width}x{image.height} pixels, limit {max_pixels}"
        )
    return image


def _content(path: str) -> bytes:
    with open_bytes(path) as file:
        return file.read()


def _decode(image: Image.Image, path: str) -> None:
    """Read the pixels, before anything else is asked of the file: what Pillow reads for itself, for EXIF or
    a frame's number, it does not complain about."""
    try:
        image.load()
    except Exception as error:  # as in `_open`
        raise Problem("unreadable image", f"{path}: {error}") from None
    if image.format == "PNG" and (damage := png_damage(_content(path))):
        raise Problem("unreadable image", f"{path}: {damage}")
