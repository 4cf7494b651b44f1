"""Packed tar archives, unpacked once to plain ones: in a packed one all is found from its start only."""

import bz2
import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from megatron_eagle.data.media.archive_scan import archive_kind, damaged
from megatron_eagle.errors import UserError
from megatron_eagle.files import beside

_BLOCK = 1 << 20
_MOST = 100  # times its own size that an archive may have in it: media do not shrink
_ALWAYS = 1 << 26  # bytes that any may have
_OPEN: dict[str, Callable[[BinaryIO], object]] = {
    "gzip": gzip.open,
    "bzip2": bz2.open,
    "xz": lzma.open,
    "zstd": lambda file: pa.input_stream(file, compression="zstd"),
}
UNPACKING_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""What reading of a damaged stream raises."""


def unpacked_stream(file: BinaryIO, packing: str) -> BinaryIO:
    """What a file holds that is packed in a way that `archive_kind` names."""
    return cast(BinaryIO, _OPEN[packing](file))


def unpacked_archive(archive: Path, packing: str, folder: Path) -> Path:
    """A plain tar archive in `folder` with what a packed one holds, made if it is not there.

    Raises:
        UserError: the archive is damaged, is no tar archive or holds far more than it has bytes, or the plain
            one cannot be written.
    """
    status = archive.stat()
    identity = f"{os.path.abspath(archive)}\0{status.st_size}\0{status.st_mtime_ns}"
    target = folder / f"{hashlib.blake2b(os.fsencode(identity)).hexdigest()[:24]}.tar"
    if target.is_file():
        return target
    most = max(_ALWAYS, _MOST * status.st_size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with beside(target, f".{os.getpid()}", durable=False) as partial, partial.open("wb") as plain:
            for block in _blocks(archive, packing):
                if plain.tell() + len(block) > most:
                    raise UserError(
                        f"{archive} holds more than {_MOST} times its own size; if that is right, unpack it"
                    )
                plain.write(block)
            plain.flush()
            if archive_kind(partial) != "tar":
                raise UserError(f"{archive} is packed with {packing}, and is no tar archive")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    return target


def _blocks(archive: Path, packing: str) -> Iterator[bytes]:
    try:
        with archive.open("rb") as file, unpacked_stream(file, packing) as stream:
            while block := stream.read(_BLOCK):
                yield block
    except UNPACKING_ERRORS as error:
        raise damaged(archive, f"({error})") from None
