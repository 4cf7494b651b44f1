"""Small things about files that all steps share: whole or not at all, JSON lines, hashes, lists of videos."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_eagle.data.formats import read_sample
from megatron_eagle.data.ledger import LedgerEntry, Problem
from megatron_eagle.data.sample import VideoSource
from megatron_eagle.errors import UserError


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file so that it is there completely or not at all, whenever the process is killed."""
    data = data.encode() if isinstance(data, str) else data
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(path)


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """Write JSON lines, whole or not at all."""
    write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_videos(path: Path) -> tuple[list[VideoSource], list[LedgerEntry]]:
    """Videos named by a file: one path a line (relative to the file), or the videos of a training JSONL.

    Each section is taken once, in the order of the file.  Lines of a JSONL that cannot be read are returned
    as ledger entries.  Raises `UserError` if the file cannot be read or names no video.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot read this list of videos: {error.strerror}") from None
    found: dict[VideoSource, None] = {}
    problems = []
    for number, raw in enumerate(lines, 1):
        try:
            if path.suffix == ".jsonl":
                sample = read_sample(raw, root=str(path.parent), file=str(path), line=number)
                found.update(dict.fromkeys(sample.videos))
            elif text := raw.decode().strip():
                found[VideoSource(os.path.normpath(path.parent / text))] = None
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}: not UTF-8; write one video path a line") from None
        except Problem as problem:
            problems.append(LedgerEntry(str(path), number, str(problem), problem.kind))
    if not found:
        raise UserError(f"{path}: names no video; write one path a line, or give a training JSONL")
    return list(found), problems
