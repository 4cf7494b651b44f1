"""The demo's conversations: reading them, and the partner whose pictures are swapped in."""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.files import split_lines

CONVERSATIONS = Path(__file__).with_name("conversations.jsonl")
# The last conversation of the file is there to be dropped: its text alone is longer than the demo's L_max.
TOO_LONG = "album-too-long"


@dataclass(frozen=True)
class Conversation:
    """One question and its answer about pictures, clips and PDF files (media as the file writes them)."""

    id: str
    question: str
    answer: str
    images: tuple[str, ...]
    videos: tuple[dict, ...]  # {"video": file, "start_time": s, "end_time": s}
    document: str | None

    @property
    def is_visual(self) -> bool:
        return bool(self.images or self.videos or self.document)

    @property
    def files(self) -> list[str]:
        """The pictures and clips; PDF files are drawn."""
        return [*self.images, *(video["video"] for video in self.videos)]


def read_conversations(path: Path = CONVERSATIONS) -> list[Conversation]:
    """All conversations of the file, in its order, the one that will be dropped included."""
    lines = split_lines(path.read_text(encoding="utf-8"))
    return [_parse(json.loads(line)) for line in lines]


def swap_partners(conversations: list[Conversation]) -> dict[str, Conversation]:
    """For each visual conversation (by id) the next one that asks the same question: its partner.

    A model that looks gives the partner's answer when it is shown the partner's pictures.
    """
    asked: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        if conversation.is_visual:
            asked.setdefault(conversation.question, []).append(conversation)
    return {
        conversation.id: group[(place + 1) % len(group)]
        for group in asked.values()
        for place, conversation in enumerate(group)
    }


def _parse(record: dict) -> Conversation:
    question, answer = (turn["value"] for turn in record["conversations"])
    images = record.get("image", [])
    videos = record.get("video", [])
    return Conversation(
        id=record["id"],
        question=question,
        answer=answer,
        images=tuple([images] if isinstance(images, str) else images),
        videos=tuple([videos] if isinstance(videos, dict) else videos),
        document=record.get("document"),
    )
