"""Anchors lift a question on a clip to the whole video: by time, or by a phrase that hints at the scene.

A phrase must not give the answer away.  The paper asks for that and not how; here are two checks: lexical, no
word of the answer beyond those of the question; and a model's judgement of what the phrase implies.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eagle.eagle_video.client import Answer, Asks
from megatron_eagle.eagle_video.prompts import Prompt, load_prompt
from megatron_eagle.eagle_video.records import clock

_ANCHOR = {
    "type": "object",
    "required": ["anchor"],
    "properties": {"anchor": {"type": "string", "minLength": 5, "example": "While something happens"}},
}
_VERDICT = {"type": "object", "required": ["leaks"], "properties": {"leaks": {"type": "boolean"}}}
_WORD = re.compile(r"[^\W_]+")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS)}
# Words that say nothing of an answer by themselves.
_COMMON_WORDS = """
a an the and or but of to in on at by for from with as is are was were be been being it its this that these
those he she they them his her their there here who what which when where while how why not no yes do does did
has have had will would can could one some any into out up down over under then than so if very also
"""
_COMMON = frozenset(_COMMON_WORDS.split())


@dataclass(frozen=True)
class ContextAnchor:
    """A phrase that passed both checks, and the answers that led to it."""

    text: str
    answers: tuple[Answer, ...]


def time_anchor(question: str, start: float, end: float) -> str:
    """The question with the seconds of the clip from the video's beginning."""
    return f"Between {clock(start)} and {clock(end)} of the video: {question.strip()}"


def context_question(question: str, anchor: str) -> str:
    """The question after the phrase."""
    return f"{anchor.strip().rstrip('.,;:?!')}: {question.strip()}"


def leaked_words(anchor: str, question: str, answer: str) -> list[str]:
    """Words of the answer, less those of the question, that the anchor says too (in any ending)."""
    known = _words(question)
    secret = [word for word in _words(answer) if not any(_same(word, other) for other in known)]
    said = _words(anchor)
    return [word for word in secret if any(_same(word, other) for other in said)]


class AnchorWriter:
    """Writes context anchors; an anchor that leaks is written again, up to `tries` times."""

    def __init__(self, client: Asks, prompts: Path | None = None, tries: int = 3) -> None:
        self._client, self._tries = client, tries
        self._write = load_prompt("context_anchor", prompts)
        self._judge = load_prompt("leak_judge", prompts)

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts it uses."""
        return [self._write, self._judge]

    async def write(self, pictures: list[dict[str, Any]], question: str, answer: str) -> ContextAnchor | None:
        """An anchor for a question on the clip that `pictures` (OpenAI parts) show; None if all leaked.

        Raises:
            Problem: as `Client.ask`.
        """
        refused: list[str] = []
        for _ in range(self._tries):
            text = self._write.fill(
                n_frames=len(pictures), question=question, answer=answer, refused="\n".join(refused)
            )
            written = await self._client.ask(
                [*pictures, {"type": "text", "text": text}], _ANCHOR, max_tokens=128
            )
            anchor = " ".join(written.value["anchor"].split())
            if words := leaked_words(anchor, question, answer):
                refused.append(f'Not this one, it says "{words[0]}": {anchor}')
                continue
            text = self._judge.fill(anchor=anchor, question=question, answer=answer)
            verdict = await self._client.ask(text, _VERDICT, max_tokens=32)
            if not verdict.value["leaks"]:
                return ContextAnchor(anchor, (written, verdict))
            refused.append(f"Not this one, it gives the answer away: {anchor}")
        return None


def _words(text: str) -> list[str]:
    """Lower case words that mean something; small numbers as digits."""
    found = [word for word in _WORD.findall(text.lower()) if word not in _COMMON or word in _NUMBERS]
    return [_NUMBERS.get(word, word) for word in found]


def _same(a: str, b: str) -> bool:
    """Equal, or of one stem: all but at most three letters at the ends of both, and at least four of them."""
    if a == b:
        return True
    stem = max(4, max(len(a), len(b)) - 3)
    return min(len(a), len(b)) >= 4 and a[:stem] == b[:stem]
