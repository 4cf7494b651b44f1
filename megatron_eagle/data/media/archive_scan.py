"""The members of an archive, one after the other, without unpacking anything.

Nothing of an archive is ever written under a name that it gives.  What cannot be read (links that lead
elsewhere, sparse and encrypted members) is found all the same, with the reason.
"""

import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from megatron_eagle.data.media.hints import of_file
from megatron_eagle.errors import UserError

_MAX_UNPACKED = 1 << 30  # bytes of a compressed member, which is unpacked in memory
_ZERO = bytes(1024)  # ends a tar archive
_BEHIND = 1 << 20  # bytes behind the end in which nothing may be
_MAGIC = {
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",  # an empty one
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
}
_MARK_AT, _MARK = 257, b"ustar"  # in the header of a tar archive's first member


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an archive.

    Attributes:
        place: where its bytes begin in a tar archive; in a zip archive, where its header does.
        refused: why it cannot be read; empty if it can.
        crc: the CRC-32 of a zip member's content; -1 in a tar archive, which has none.
        packed: whether it is compressed.
    """

    name: str
    place: int
    size: int
    refused: str = ""
    crc: int = -1
    packed: bool = False


def archive_kind(path: Path) -> str:
    """What a file is by how it begins: tar, zip, or something packed (gzip, zstd, bzip2, xz); "" if neither.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(512)
    found = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")
    is_tar = head[_MARK_AT:].startswith(_MARK) or path.name.lower().endswith(".tar")
    return "tar" if is_tar and not found else found


def damaged(archive: Path, what: str) -> UserError:
    """The line for an archive that cannot be read to its end, `what` being where or why."""
    return UserError(f"{archive} is damaged or cut off {what}{of_file(str(archive)) or '; fetch it again'}")


def scan(path: Path, kind: str) -> list[Member]:
    """The members of a tar or zip archive in their order, each name once: the last one of it counts.

    Raises:
        UserError: the archive is damaged or cut off.
    """
    found: dict[str, Member] = {}
    try:
        for member in (_zip_members if kind == "zip" else _tar_members)(path):
            if name := plain_name(member.name):
                found.pop(name, None)
                plain = member if name == member.name else replace(member, name=name)
                found[name] = _followed(plain, found)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return list(found.values())


def plain_name(name: str) -> str:
    """A member's name as others refer to it; nothing for one that leads out of its archive, or to no file."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    unsafe = name.startswith("/") or ".." in parts or "\0" in name
    return "" if unsafe or name.endswith("/") else "/".join(parts)


_LINK = "a link to "


def _followed(member: Member, found: dict[str, Member]) -> Member:
    """A hard link is the earlier member that it names."""
    if not member.refused.startswith(_LINK):
        return member
    target = found.get(plain_name(member.refused.removeprefix(_LINK)))
    return replace(target, name=member.name) if target else member


def _tar_members(path: Path) -> Iterator[Member]:
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it grows otherwise
                    if not member.isdir():
                        yield _tar_member(member)
                _check_end(path, file, tar.offset)
        except tarfile.TarError as error:
            raise damaged(path, f"({error})") from None


def _tar_member(member: tarfile.TarInfo) -> Member:
    refused = ""
    if member.islnk():
        refused = f"{_LINK}{member.linkname}"
    elif member.issym():
        refused = "a symbolic link"
    elif member.issparse():
        refused = "stored as a sparse file"
    elif not member.isreg():
        refused = "no regular file"
    return Member(member.name, member.offset_data, member.size, refused)


def _check_end(path: Path, file: BinaryIO, end: int) -> None:
    """Tell the end of a tar archive from a place where reading it stops.

    Raises:
        UserError: no end mark is there, or there is more behind it.
    """
    file.seek(end)
    mark = file.read(len(_ZERO))
    if not mark:
        raise UserError(
            f"{path} has no end mark at byte {end}, so it may have been cut off; fetch it again, or if it is "
            f"whole, add one: head -c 1024 /dev/zero >> {path}"
        )
    if mark != _ZERO[: len(mark)] or len(mark) < 512:
        raise damaged(path, f"at byte {end}")
    if any(file.read(_BEHIND)):
        raise UserError(
            f"{path} has more behind its end mark at byte {end}; join archives with tar --concatenate"
        )


def _zip_members(path: Path) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(("/", "\\")):
                    yield _zip_member(member)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise damaged(path, f"({error})") from None


def _zip_member(member: zipfile.ZipInfo) -> Member:
    refused, packed = "", member.compress_type == zipfile.ZIP_DEFLATED
    if stat.S_ISLNK(member.external_attr >> 16):
        refused = "a symbolic link"
    elif member.flag_bits & 1:
        refused = "encrypted"
    elif packed and member.file_size > _MAX_UNPACKED:
        refused = f"compressed, with more than {_MAX_UNPACKED:,} bytes; unpack it"
    elif not packed and member.compress_type != zipfile.ZIP_STORED:
        refused = f"compressed by a method that is not read ({member.compress_type}); unpack it"
    elif not packed and member.compress_size != member.file_size:
        refused = "damaged: its two sizes differ"
    name = member.filename
    if "/" not in name:
        name = name.replace("\\", "/")  # as Windows packs them, and as unzip reads them
    return Member(name, member.header_offset, member.file_size, refused, member.CRC, packed)


def tar_header_name(file: BinaryIO, place: int) -> str:
    """The name in the header before the bytes at a place of a tar archive; "" if no plain member is there."""
    file.seek(place - tarfile.BLOCKSIZE)
    try:
        member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), tarfile.ENCODING, "surrogateescape")
    except tarfile.TarError:
        return ""
    return plain_name(member.name) if member.isreg() and not member.issparse() else ""
