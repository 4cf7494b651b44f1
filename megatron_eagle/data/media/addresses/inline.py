"""Pictures inside of their address: `data:image/...;base64,...`, as records may hold them.

A store takes them into its own media files.
"""

import base64
import binascii
import io
import re
from typing import BinaryIO

from megatron_eagle.data.media.addresses.base import FileMetadata, content_fingerprint, open_value
from megatron_eagle.problems import Problem

MOST_CHARACTERS = 1 << 25  # of an address: a picture of 24 MB
_DATA = re.compile(r"data:(?P<kind>image/[\w.+-]+)?(?:;[\w.=+-]+)*?;base64,", re.IGNORECASE)
_SHOWN = 16


def is_inline(path: str) -> bool:
    """Whether an address holds a medium itself."""
    return path[:5].lower() == "data:"


def short_name(path: str) -> str:
    """What people are told of such an address."""
    return f"{path[: path.find(',') + 1 + _SHOWN][:80]}..."


def check_inline(path: str) -> str:
    """An address that holds a picture, as far as that is seen without reading it.

    Raises:
        Problem: it holds something else, or too much.
    """
    if len(path) > MOST_CHARACTERS:
        raise Problem(
            "media too large", f"{short_name(path)} has {len(path):,} characters, limit {MOST_CHARACTERS:,}"
        )
    if _DATA.match(path) is None:
        raise Problem("unsupported media", f"{short_name(path)} is no picture in base64")
    return path


class Inline:
    """See `AddressKind`."""

    def metadata(self, path: str) -> FileMetadata:
        """Size of the picture; it is never another one."""
        return FileMetadata(path, len(_content(path)), 0)

    def fingerprint(self, path: str) -> int:
        """See `content_fingerprint`."""
        content = _content(path)
        return content_fingerprint(io.BytesIO(content), len(content))

    def open(self, path: str) -> BinaryIO:
        """The picture."""
        content = _content(path)
        return open_value(content, path)


def _content(path: str) -> bytes:
    text = "".join(path.partition(",")[2].split())
    try:
        return base64.b64decode(text, altchars=b"-_" if re.search("[-_]", text) else None, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Problem("unreadable image", f"{path}: broken base64: {error}") from None
