"""Pictures as training and every export see them: upright, RGB, without transparency."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Decoders that read nothing but the file (Pillow's EPS reader, for one, starts a program).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
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
# Tags of TIFF: bits of a value, and whether 0 is white.
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


def open_picture(source: "str | Path | BinaryIO") -> Image.Image:
    """Open a path or a stream; pixels are not read yet.

    Raises:
        OSError: it cannot be opened, or is no picture of a kind that is read (`PIL.UnidentifiedImageError`);
            HEIC without its reader.
    """
    Image.init()  # registers the readers; does nothing the second time
    if "HEIF" not in Image.OPEN:
        try:
            from pillow_heif import register_heif_opener

            register_heif_opener()
        except ImportError:
            pass
    # A build of Pillow may be without some of them.
    try:
        return Image.open(source, formats=[name for name in _FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        if "HEIF" not in Image.OPEN and _is_heif(source):
            raise OSError("it is in HEIC, which needs pillow-heif: pip install pillow-heif") from None
        raise


def _is_heif(source: "str | Path | BinaryIO") -> bool:
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            head = file.read(12)
    else:
        source.seek(0)
        head = source.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a picture whose pixels are read (Pillow turns a TIFF when it reads them)."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken EXIF block says nothing of the picture itself
        return 1


def check_scale(image: Image.Image) -> None:
    """Whether the file says which of a picture's values is white, as those of 8, 12 and 16 bits do.

    Raises:
        ValueError: it does not: floats, 32-bit and signed integers.
    """
    deep = image.mode == "I" and image.format == "TIFF"  # elsewhere Pillow means 16 bits by it
    if image.mode == "F" or deep:
        kind = "floats" if image.mode == "F" else "32-bit or signed integers"
        raise ValueError(f"its values are {kind}, which have no white; convert it to 8 or 16 bits")


def _tiff_tag(image: Image.Image, tag: int, default: int) -> int:
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def to_rgb(image: Image.Image) -> Image.Image:
    """A copy in upright RGB: transparency over white, deep grey by its upper eight bits.

    Raises:
        ValueError: as `check_scale`.
    """
    image.load()
    check_scale(image)
    upright = _UPRIGHT.get(orientation(image))
    if image.mode.startswith("I"):  # Pillow's own conversion clips to white
        values = np.asarray(image).astype(np.int64) >> (_tiff_tag(image, _BITS, 16) - 8)
        if _tiff_tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO:  # Pillow turns only 8 bits of it
            values = 255 - values
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba.getchannel("A"))
    image = image.convert("RGB") if upright is None else image.convert("RGB").transpose(upright)
    image.info = {}  # with the orientation, which is done
    return image
