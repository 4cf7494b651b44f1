"""Clip level of Eagle-Video, bottom-up: questions on a clip, then anchors that lift each to the video."""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_eagle.data.sample import VideoSource
from megatron_eagle.eagle_video.anchors import AnchorWriter, context_question, time_anchor
from megatron_eagle.eagle_video.client import Answer, Asks
from megatron_eagle.eagle_video.features import Clip
from megatron_eagle.eagle_video.files import digest
from megatron_eagle.eagle_video.frames import frames_at, open_section, sample_times
from megatron_eagle.eagle_video.prompts import load_prompt
from megatron_eagle.eagle_video.records import Notes, picture_parts, provenance, training_line
from megatron_eagle.problems import Problem


@dataclass(frozen=True)
class ClipSettings:
    """Frames a second and per clip, kinds of questions per clip, pixels of a frame's longer side."""

    fps: float = 2.0
    max_frames: int = 50
    questions: int = 3
    side: int = 512
    seed: int = 0


class ClipQuestions:
    """Annotates one clip at a time; `types` is the pool of kinds of questions."""

    def __init__(
        self,
        client: Asks,
        output: Path,
        notes: Notes,
        types: Mapping[str, str],
        settings: ClipSettings = ClipSettings(),
        prompts: Path | None = None,
    ) -> None:
        self._client, self._output, self._notes, self._settings = client, output, notes, settings
        self._types = types
        self._prompt = load_prompt("clip_questions", prompts)
        self._anchors = AnchorWriter(client, prompts)

    async def annotate(self, clip: Clip) -> list[dict[str, Any]]:
        """Training lines of one clip: per question one with a time anchor, one with a context anchor."""
        where = f"{clip.video} {clip.start:g}-{clip.end:g} s"
        try:
            pictures, begin = await asyncio.to_thread(self._pictures, clip)
            questions = await self._ask(clip, pictures)
        except Problem as problem:
            self._notes.add(problem.kind, f"{where}: {problem.detail}")
            return []
        if not questions.value["qa"]:
            self._notes.add("no questions", where)
        lines = []
        for item in questions.value["qa"][: self._settings.questions]:
            if item["type"] not in self._types:
                self._notes.add("unknown kind of question", f"{where}: {item['type']!r}")
                continue
            start, end = clip.start - begin, clip.end - begin
            lifted = time_anchor(item["question"], start, end)
            lines.append(self._line(clip, item, lifted, "time", [questions]))
            try:
                anchor = await self._anchors.write(pictures, item["question"], item["answer"])
            except Problem as problem:
                self._notes.add(problem.kind, f"{where}, anchor: {problem.detail}")
                continue
            if anchor is None:
                self._notes.add("anchor leaks", f"{where}: {item['question']!r}")
                continue
            lifted = context_question(item["question"], anchor.text)
            lines.append(self._line(clip, item, lifted, "context", [questions, *anchor.answers]))
        return lines

    def _pictures(self, clip: Clip) -> tuple[list[dict[str, Any]], float]:
        """The clip's frames as content parts, and where the video begins on the file's clock."""
        start, end = Fraction(str(clip.start)), Fraction(str(clip.end))
        metadata, _ = open_section(VideoSource(clip.video, start, end))
        begin = float(int(metadata.table.pts[0]) * metadata.table.time_base)
        times = sample_times(start, end, self._settings.fps, self._settings.max_frames)
        return picture_parts(frames_at(metadata, times), self._settings.side), begin

    async def _ask(self, clip: Clip, pictures: list[dict[str, Any]]) -> Answer:
        # The kinds depend on the clip and the seed alone, so that a run that goes on asks the same again.
        draw = random.Random(digest([self._settings.seed, clip.video, clip.start, clip.end]))
        kinds = draw.sample(sorted(self._types), min(self._settings.questions, len(self._types)))
        text = self._prompt.fill(
            n_frames=len(pictures),
            seconds=f"{clip.end - clip.start:g}",
            types="\n".join(f"- {kind}: {self._types[kind]}" for kind in kinds),
        )
        item = {
            "type": "object",
            "required": ["type", "question", "answer"],
            "properties": {
                "type": {"type": "string", "example": kinds[0]},
                "question": {"type": "string", "minLength": 1, "example": "What is it?"},
                "answer": {"type": "string", "minLength": 1, "example": "unknown"},
            },
        }
        schema = {
            "type": "object",
            "required": ["qa"],
            "properties": {"qa": {"type": "array", "items": item, "example": [_example(item)] * len(kinds)}},
        }
        return await self._client.ask([*pictures, {"type": "text", "text": text}], schema)

    def _line(
        self, clip: Clip, item: dict[str, Any], question: str, anchor: str, answers: list[Answer]
    ) -> dict[str, Any]:
        prompts = [self._prompt, *(self._anchors.prompts if anchor == "context" else [])]
        origin = provenance(
            "clips",
            self._client,
            prompts,
            answers,
            clip=[clip.start, clip.end],
            question_type=item["type"],
            anchor=anchor,
        )
        return training_line(clip.video, question, item["answer"], self._output, origin)


def _example(item: dict[str, Any]) -> dict[str, Any]:
    return {key: part["example"] for key, part in item["properties"].items()}
