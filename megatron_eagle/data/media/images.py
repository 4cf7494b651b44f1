"""Pictures: files are checked before they are used, upright RGB when they are read; pages are drawn."""

import numpy as np
from PIL import ExifTags, Image

from megatron_eagle.data.media.documents import draw_page
from megatron_eagle.data.media.source import open_media, page_ref
from megatron_eagle.problems import Problem

DEFAULT_MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: 9459 x 9459
MAX_MAX_PIXELS = 2 * DEFAULT_MAX_PIXELS  # where Pillow itself refuses to open a picture
# Decoders that read nothing but the file (Pillow's EPS reader, for one, starts a program); a build of Pillow
# may be without some of them.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# EXIF orientation -> what brings the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_size(path: str, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Width and height of a picture as it is shown, after checking that all of it can be decoded.

    Raises `Problem` for a file that is missing, empty, broken, cut off or larger than `max_pixels`.
    """
    image = _open(path, max_pixels)
    # A JPEG decoded at an eighth of its size is read to its end, which is all that the check needs.
    size = image.size
    image.draft(None, (size[0] // 8, size[1] // 8))
    turned = _orientation(image) in (5, 6, 7, 8)
    _decode(image, path)
    return size[::-1] if turned else size


def load_image(path: str, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """An upright RGB picture (the first one of an animation), alpha laid over white; or a page of a document.

    `path` may be any name that `source` knows.  Raises `Problem`.
    """
    if page := page_ref(path):
        return draw_page(page, max_pixels=max_pixels)
    image = _open(path, max_pixels)
    upright = _UPRIGHT.get(_orientation(image))
    _decode(image, path)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips it to white
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba.getchannel("A"))
    image = image.convert("RGB")
    return image.transpose(upright) if upright is not None else image


def _open(path: str, max_pixels: int) -> Image.Image:
    source = open_media(path)
    Image.init()  # registers the readers; does nothing the second time
    try:
        image = Image.open(source, formats=[name for name in _FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError:
        raise Problem("image too large", f"{path} (more than {max_pixels} pixels)") from None
    except Image.UnidentifiedImageError:
        raise Problem("unreadable image", f"{path} is no picture of a known format") from None
    except Exception as error:  # broken headers raise almost anything: OSError, SyntaxError, struct.error
        raise Problem("unreadable image", f"{path}: {error}") from None
    if image.width * image.height > max_pixels:
        image.close()
        raise Problem(
            "image too large", f"{path} has {image.width}x{image.height} pixels, limit {max_pixels}"
        )
    return image


def _decode(image: Image.Image, path: str) -> None:
    try:
        image.load()
    except Exception as error:  # as in `_open`
        raise Problem("unreadable image", f"{path}: {error}") from None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block says nothing of the picture itself
        return 1
