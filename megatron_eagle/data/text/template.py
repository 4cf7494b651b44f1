"""The chat template: one renderer for the training text and for what the Hugging Face processor writes.

A sample becomes a sequence of pieces: plain text, single special tokens, runs of image tokens.  Text between
two special tokens is one piece and is tokenised as a whole, so the ids equal those of tokenising the full
rendered string with its special tokens parsed; a special token that somebody typed stays text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_eagle.data.sample import ASSISTANT, SYSTEM, DocumentRef, ImageRef, Sample, Turn
from megatron_eagle.data.text.tokenizer import Tokenizer
from megatron_eagle.hf_model import prompt
from megatron_eagle.hf_model.prompt import (
    END_THINK,
    IM_END,
    IM_START,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    THINK,
)

VARIANTS = ("train", "hf")
_SYSTEM_PROMPT = {
    "train": "You are an AI assistant whose name is Eagle-Next.",
    "hf": prompt.SYSTEM_PROMPT,
}


@dataclass(frozen=True)
class Text:
    """Plain text, tokenised as one piece; from character `start` on it is part of `answer` (0 = none)."""

    value: str
    answer: int = 0
    start: int = 0


@dataclass(frozen=True)
class Special:
    """One special token; `answer` as in `Text`."""

    name: str
    answer: int = 0


@dataclass(frozen=True)
class ImageTokens:
    """`tiles` tiles of one picture or frame, as a run of image tokens."""

    tiles: int


TextPiece = Text | Special | ImageTokens


@dataclass(frozen=True)
class ShownVideo:
    """What the text says of a video: its duration in seconds and the times of the frames shown."""

    duration: Fraction
    times: Sequence[float]


@dataclass(frozen=True)
class Encoded:
    """A rendered sample: ids int32 [s] and answers uint16 [s], each token's 1-based answer (0 = none)."""

    ids: np.ndarray
    answers: np.ndarray


class Template:
    """Renders samples in one variant (`train` or `hf`, EAGLE 2.5's training text and its HF processor's).

    Where the tokenizer has tokens around thoughts, an answer that does not begin with thoughts begins with an
    empty block of them, which is no part of what is learned: a prompt that asks for an answer has it too.
    """

    def __init__(self, tokenizer: Tokenizer, variant: str, tokens_per_tile: int):
        if variant not in VARIANTS:
            raise ValueError(f"template variant must be one of {VARIANTS}, got {variant!r}")
        self.tokenizer = tokenizer
        self.variant = variant
        self.tokens_per_tile = tokens_per_tile
        self._ids = {name: tokenizer.token_id(name) for name in (IM_START, IM_END, IMG_START, IMG_END)}
        self.image_token_id = tokenizer.token_id(IMG_CONTEXT)
        self.thinks = tokenizer.has_token(THINK) and tokenizer.has_token(END_THINK)
        if self.thinks:
            self._ids |= {name: tokenizer.token_id(name) for name in (THINK, END_THINK)}
            # In a text a special token is what its letters are, also for the exported processor.
            self._may_be_written = not tokenizer.is_special(self._ids[THINK])

    @property
    def default_system(self) -> str:
        """What the system's turn says where a sample has none."""
        return _SYSTEM_PROMPT[self.variant]

    def pieces(
        self,
        sample: Sample,
        tiles: Sequence[int],
        videos: Sequence[ShownVideo],
        documents: Sequence[Sequence[int]] = (),
    ) -> Iterator[TextPiece]:
        """The finished sample, given the tile count of each image, the frames shown of each video and the
        tile count of each page shown of each document.
        """
        turns = sample.turns
        if turns[0].role != SYSTEM:
            turns = (Turn(SYSTEM, (self.default_system,)), *turns)
        answer = 0
        text = ""  # what has been written since the last special token
        for turn in turns:
            if text:
                yield Text(text)
            yield Special(IM_START)
            text = f"{turn.role}\n"
            if turn.role == ASSISTANT:
                answer += turn.learned
                mark = answer if turn.learned else 0
                [said] = turn.parts
                assert isinstance(said, str), "an answer shows no media"
                if self.thinks and not (self._may_be_written and said.startswith(THINK)):
                    yield from self._no_thoughts(text)
                    text = "\n\n"
                yield Text(text + said, mark, len(text))
                yield Special(IM_END, mark)
                text = "\n"
                continue
            for part in turn.parts:
                if isinstance(part, str):
                    text += part
                elif isinstance(part, ImageRef | DocumentRef):
                    for number, shown in self._pictures(part, sample, tiles, documents):
                        yield Text(text + (prompt.image_label(number) if number else ""))
                        yield from self._block(shown)
                        text = "\n" if self.variant == "train" else ""
                else:
                    video = videos[part.index]
                    text += self.video_header(part.index, video)
                    for number, time in enumerate(video.times, 1):
                        yield Text(text + self.frame_label(number, time))
                        yield from self._block(1)
                        text = ""
                    text = "\n" if self.variant == "train" else ""
            if text:
                yield Text(text)
            yield Special(IM_END)
            text = "\n"
        yield Text(text)

    @staticmethod
    def _no_thoughts(before: str) -> Iterator[TextPiece]:
        """`before` and `prompt.NO_THOUGHTS`, but for the line ends that go on into the answer."""
        yield Text(before)
        yield Special(THINK)
        yield Text("\n\n")
        yield Special(END_THINK)

    @staticmethod
    def _block(tiles: int) -> Iterator[TextPiece]:
        yield Special(IMG_START)
        yield ImageTokens(tiles)
        yield Special(IMG_END)

    def _pictures(
        self, part: ImageRef | DocumentRef, sample: Sample, tiles: Sequence[int], documents: Sequence[Any]
    ) -> Iterator[tuple[int, int]]:
        """Number (1-based, 0 = without a label) and tiles of an image, or of each page shown of a document.

        Pages are numbered after all images, so that an image keeps its number whatever a document gives up.
        """
        if isinstance(part, ImageRef):
            labelled = len(sample.images) > 1 or sample.documents or self.variant == "hf"
            yield part.index + 1 if labelled else 0, tiles[part.index]
            return
        first = len(sample.images) + sum(map(len, documents[: part.index])) + 1
        yield from enumerate(documents[part.index], first)

    def video_header(self, index: int, video: ShownVideo) -> str:
        """What stands before the frames of video `index`, from 0."""
        fps = float(len(video.times) / video.duration)
        if self.variant == "hf":
            return prompt.video_label(index + 1, fps)
        seconds = float(video.duration)
        return f"The {prompt.ordinal(index + 1)} video of {seconds:.2f} seconds at {fps:.2f} fps: "

    def frame_label(self, number: int, time: float) -> str:
        """What stands before frame `number`, from 1, shown at `time` seconds."""
        return prompt.frame_label(number, time) if self.variant == "hf" else f"Frame {number}: "

    def count(
        self,
        sample: Sample,
        tiles: Sequence[int],
        videos: Sequence[ShownVideo],
        documents: Sequence[Sequence[int]] = (),
    ) -> int:
        """Exact number of tokens of the finished sample (C(plan) of EAGLE 2.5's Eq. 2)."""
        total = 0
        for piece in self.pieces(sample, tiles, videos, documents):
            if isinstance(piece, Text):
                total += self.tokenizer.count(piece.value)
            elif isinstance(piece, ImageTokens):
                total += piece.tiles * self.tokens_per_tile
            else:
                total += 1
        return total

    def text(
        self,
        sample: Sample,
        tiles: Sequence[int],
        videos: Sequence[ShownVideo],
        documents: Sequence[Sequence[int]] = (),
    ) -> str:
        """The finished sample as one string."""

        def write(piece: TextPiece) -> str:
            if isinstance(piece, Text):
                return piece.value
            if isinstance(piece, ImageTokens):
                return IMG_CONTEXT * (piece.tiles * self.tokens_per_tile)
            return piece.name

        return "".join(write(piece) for piece in self.pieces(sample, tiles, videos, documents))

    def encode(
        self,
        sample: Sample,
        tiles: Sequence[int],
        videos: Sequence[ShownVideo],
        documents: Sequence[Sequence[int]] = (),
    ) -> Encoded:
        """The finished sample as ids with the loss mask: answers up to and including their `<|im_end|>`."""
        ids: list[int] = []
        answers: list[int] = []
        for piece in self.pieces(sample, tiles, videos, documents):
            if isinstance(piece, Text):
                new, before = self.tokenizer.encode_split(piece.value, piece.start)
                marks = [0] * before + [piece.answer] * (len(new) - before)
            elif isinstance(piece, ImageTokens):
                new = [self.image_token_id] * (piece.tiles * self.tokens_per_tile)
                marks = [0] * len(new)
            else:
                new, marks = [self._ids[piece.name]], [piece.answer]
            ids += new
            answers += marks
        return Encoded(np.array(ids, np.int32), np.array(answers, np.uint16))
