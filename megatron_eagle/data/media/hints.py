"""Words for mistakes that are often made with media, for the end of an error's line."""

import os

_POINTER = b"version https://git-lfs"


def of_content(head: bytes) -> str:
    """What the first bytes of a file say that is no medium; nothing where they say nothing."""
    if head.startswith(_POINTER):
        return "; it is a pointer of git-lfs, not the file itself; run git lfs pull"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "; it is a web page, maybe of an error"
    return ""


def of_file(path: str) -> str:
    """The same of a file of this machine; other names say nothing."""
    try:
        with open(path, "rb") as file:
            return of_content(file.read(64))
    except (OSError, ValueError):
        return ""


def of_missing(path: str) -> str:
    """Why a file of this name may be missing."""
    plain = path.replace("\\", "/")
    if plain == path:
        return ""
    there = ", that file is there" if os.path.exists(plain) else ""
    return f"; its name has backslashes, as on Windows; write {plain}{there}"
