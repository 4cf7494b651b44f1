"""Small things that all steps share: hashes, lists of videos."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from megatron_eagle.data.annotations.formats import read_sample
from megatron_eagle.data.sample import VideoSource
from megatron_eagle.errors import UserError
from megatron_eagle.problems import LedgerEntry, Problem


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_videos(path: Path) -> tuple[list[VideoSource], list[LedgerEntry]]:
    """Videos named by a file: one path a line (relative to the file), or the videos of a training JSONL.

    Each section is taken once, in the order of the file.  Lines of a JSONL that cannot be read are returned
    as ledger entries.

    Raises:
        UserError: the file cannot be read or names no video.
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
                if any(video.frames is not None for video in sample.videos):
                    raise Problem("unsupported media", "frames that are given one by one are no video file")
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
