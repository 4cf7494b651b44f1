"""Damage in picture files that their decoders pass over: the checksums of PNG, the warnings of libjpeg."""

import importlib.util
import struct
import zlib

from megatron_eagle.errors import UserError

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_MARKER = b"\xff\xd8\xff"


def png_damage(data: bytes) -> str:
    """What is wrong with a PNG file by its own checksums, or nothing; other files are not looked at.

    Pillow checks neither the checksums of the chunks that hold pixels nor, where the last row is complete,
    that of the pixels themselves.
    """
    if not data.startswith(_PNG_SIGNATURE):
        return ""
    view, place = memoryview(data), len(_PNG_SIGNATURE)
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(view[place + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            return f"the checksum of its chunk {kind.decode('latin1')!r} at byte {place} is wrong"
        if kind == b"IEND":
            return ""
        place = end + 4
    return "truncated: the file ends before its chunk 'IEND'"


def jpeg_warning(data: bytes) -> str:
    """The first thing about a JPEG file that libjpeg warns of, or nothing; other files are not looked at.

    Pillow has no switch for these warnings: damaged parts become grey or are moved without a word.
    """
    if not data.startswith(_JPEG_MARKER):
        return ""
    import simplejpeg

    try:
        colours = simplejpeg.decode_jpeg_header(data)[2]
        wanted = "CMYK" if colours in ("CMYK", "YCCK") else "GRAY"
        simplejpeg.decode_jpeg(data, wanted, min_factor=8)  # an eighth of the size, read to the end
    except ValueError as error:
        return " ".join(str(error).split())
    return ""


def need_simplejpeg() -> None:
    """Ask for the library of `jpeg_warning`.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("simplejpeg") is None:
        raise UserError("--strict-jpeg needs simplejpeg: pip install 'megatron-eagle[media]'")
