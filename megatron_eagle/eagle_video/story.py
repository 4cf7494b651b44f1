"""Story level of Eagle-Video, top-down: chapters -> dense captions -> questions on the whole video.

A chapter is shown with up to 2 frames a second and at most 50; its title guides the caption.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_eagle.data.sample import VideoSource
from megatron_eagle.data.sampling.probe import VideoMetadata
from megatron_eagle.eagle_video.chapters import BoundedChapter, ChapteredVideo, chapters_within
from megatron_eagle.eagle_video.client import Answer, Asks
from megatron_eagle.eagle_video.frames import frames_at, open_section, sample_times
from megatron_eagle.eagle_video.prompts import load_prompt
from megatron_eagle.eagle_video.records import Notes, clock, picture_parts, provenance, training_line
from megatron_eagle.problems import Problem

_TEXT = {"type": "string", "minLength": 1}
CAPTION = {
    "type": "object",
    "required": ["caption"],
    "properties": {"caption": {**_TEXT, "example": "dry run " * 100}},
}
QUESTIONS = {
    "type": "object",
    "required": ["qa"],
    "properties": {
        "qa": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["question", "answer"],
                "properties": {"question": _TEXT, "answer": _TEXT},
            },
        }
    },
}


@dataclass(frozen=True)
class StorySettings:
    """Frames a second and per chapter, questions per video, pixels of a frame's longer side."""

    fps: float = 2.0
    max_frames: int = 50
    questions: int = 5
    side: int = 512


class Story:
    """Annotates one video at a time; `output` is the file its lines are for."""

    def __init__(
        self,
        client: Asks,
        output: Path,
        notes: Notes,
        settings: StorySettings = StorySettings(),
        prompts: Path | None = None,
    ) -> None:
        self._client, self._output, self._notes, self._settings = client, output, notes, settings
        self._caption = load_prompt("story_caption", prompts)
        self._questions = load_prompt("story_questions", prompts)

    async def annotate(self, video: ChapteredVideo) -> list[dict[str, Any]]:
        """Training lines of one video; what fails is noted and costs its chapter, or the video."""
        try:
            metadata, begin = open_section(VideoSource(video.path))
            duration = float(metadata.duration)
            chapters = chapters_within(video, duration, self._notes)
            captions: list[tuple[BoundedChapter, Answer]] = []
            for chapter in chapters:  # one after the other: only one chapter's frames are held
                start, end = (begin + Fraction(str(t)) for t in (chapter.start, chapter.end))
                times = sample_times(start, end, self._settings.fps, self._settings.max_frames)
                try:
                    pictures = await asyncio.to_thread(self._pictures, metadata, times)
                    captions.append((chapter, await self._describe(chapter, pictures, duration)))
                except Problem as problem:
                    self._notes.add(problem.kind, f"{video.id}, chapter {chapter.title!r}: {problem.detail}")
            if not captions:
                self._notes.add("no captions", f"{video.id}: none of {len(video.chapters)} chapters")
                return []
            questions = await self._ask(captions, duration)
        except Problem as problem:
            self._notes.add(problem.kind, f"{video.id}: {problem.detail}")
            return []
        origin = provenance(
            "story",
            self._client,
            [self._caption, self._questions],
            [*(answer for _, answer in captions), questions],
            video=video.id,
            chapters=[[c.title, c.start, c.end] for c, _ in captions],
        )
        return [
            training_line(video.path, item["question"], item["answer"], self._output, origin)
            for item in questions.value["qa"][: self._settings.questions]
        ]

    def _pictures(self, metadata: VideoMetadata, times: Sequence[Fraction]) -> list[dict[str, Any]]:
        return picture_parts(frames_at(metadata, times), self._settings.side)

    async def _describe(
        self, chapter: BoundedChapter, pictures: list[dict[str, Any]], duration: float
    ) -> Answer:
        text = self._caption.fill(
            n_frames=len(pictures),
            start=clock(chapter.start),
            end=clock(chapter.end),
            duration=clock(duration),
            title=chapter.title,
        )
        return await self._client.ask([*pictures, {"type": "text", "text": text}], CAPTION)

    async def _ask(self, captions: list[tuple[BoundedChapter, Answer]], duration: float) -> Answer:
        joined = "\n\n".join(
            f"{clock(c.start)} to {clock(c.end)}, {c.title}:\n{answer.value['caption'].strip()}"
            for c, answer in captions
        )
        text = self._questions.fill(
            duration=clock(duration), captions=joined, n_questions=self._settings.questions
        )
        return await self._client.ask(text, QUESTIONS, max_tokens=2048)
