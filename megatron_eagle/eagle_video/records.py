"""What the pipeline writes: training lines with their provenance, and a ledger of what is missing."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_eagle.data.media.thumbnails import jpeg_url
from megatron_eagle.eagle_video.client import Answer, Asks
from megatron_eagle.eagle_video.prompts import Prompt
from megatron_eagle.files import write_lines
from megatron_eagle.problems import LedgerEntry

_PLACEHOLDER = re.compile(r"<(image|video|document)(-[0-9]+)?>")


@dataclass
class Notes:
    """The ledger of a run.  `file` is what it read; a line number of 0 means all of it."""

    file: str
    entries: list[LedgerEntry] = field(default_factory=list)

    def add(self, kind: str, detail: str, line: int = 0) -> None:
        """Note what was left out, and why."""
        self.entries.append(LedgerEntry(self.file, line, f"{kind}: {detail}", kind))

    def write(self, path: Path) -> Counter[str]:
        """Write the ledger in an order that does not depend on which answer came first; counts by kind."""
        write_lines(path, map(asdict, sorted(self.entries, key=lambda e: (e.line, e.reason))))
        return Counter(entry.kind for entry in self.entries)


def training_line(
    video: str, question: str, answer: str, output: Path, provenance: Mapping[str, object]
) -> dict[str, Any]:
    """One question about a whole video as `data.annotations` reads it, its path relative to `output`."""
    path = os.path.relpath(video, output.resolve().parent)
    return {
        "video": path,
        "conversations": [
            {"from": "human", "value": f"<video>\n{_plain(question)}"},
            {"from": "gpt", "value": answer.strip()},
        ],
        "provenance": dict(provenance),
    }


def provenance(
    step: str, client: Asks, prompts: Iterable[Prompt], answers: Iterable[Answer], **more: object
) -> dict[str, Any]:
    """Where a sample comes from: its step, model, prompt versions, keys of the cached answers, and more."""
    versions = {prompt.name: prompt.version for prompt in prompts}
    keys = [answer.key for answer in answers]
    return {"recipe": step, "model": client.model, "prompts": versions, "requests": keys, **more}


def picture_parts(frames: Iterable[np.ndarray], side: int) -> list[dict[str, Any]]:
    """Frames uint8 [h, w, 3] as OpenAI content parts: JPEG of at most `side` pixels."""
    urls = (jpeg_url(Image.fromarray(frame), side, quality=85) for frame in frames)
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def clock(seconds: float) -> str:
    """83.4 -> 01:23; from an hour on 1:00:00."""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes:02d}:{whole % 60:02d}"


def _plain(text: str) -> str:
    """A question that spells a media placeholder would ask for media that are not there."""
    return _PLACEHOLDER.sub(r"\1", text).strip()
