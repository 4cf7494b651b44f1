"""A stored sample told back as a conversation, from nothing but its ids and its plan of media.

The store alone says what training sees. What is told back is rendered once more by training's template: a
row that does not give the same ids again is an error, not a guess.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_eagle.data.sample import (
    ASSISTANT,
    SYSTEM,
    DocumentRef,
    ImageRef,
    Sample,
    Turn,
    VideoRef,
    VideoSource,
)
from megatron_eagle.data.store.reader import StoredSample
from megatron_eagle.data.text.template import ShownVideo, Template
from megatron_eagle.data.text.tokenizer import Tokenizer
from megatron_eagle.hf_model.prompt import IM_END, IM_START, IMG_END, IMG_START, image_label


class UntoldError(Exception):
    """A row that cannot be told back; says why."""


@dataclass(frozen=True)
class Told:
    """A conversation.

    Attributes:
        sample: for training's template.
        own_system: whether its system turn is its own, not its template's.
    """

    sample: Sample
    tiles: list[int]
    videos: list[ShownVideo]
    page_tiles: list[list[int]]
    own_system: bool

    def encode(self, template: Template) -> list[int]:
        """Its ids in a variant of the template."""
        ids = template.encode(self.sample, self.tiles, self.videos, self.page_tiles).ids
        return [int(token) for token in ids]

    def messages(self, media: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """For an exported processor: `media`, pictures and then videos, at the beginning of the first user's
        turn, and in the texts where each is shown."""
        messages: list[dict[str, Any]] = []
        n_pictures = len(self.sample.images)
        for turn in self.sample.turns:
            text = "".join(
                part if isinstance(part, str) else self._placeholder(part, n_pictures) for part in turn.parts
            )
            messages.append({"role": turn.role, "content": [{"type": "text", "text": text}]})
        first = next((m for m in messages if m["role"] not in (SYSTEM, ASSISTANT)), messages[0])
        first["content"][:0] = media
        return messages

    def _placeholder(self, part: Any, n_pictures: int) -> str:
        if isinstance(part, ImageRef):
            return f"<image-{part.index + 1}>"
        if isinstance(part, VideoRef):
            return f"<video-{part.index + 1}>"
        first = n_pictures + sum(map(len, self.page_tiles[: part.index])) + 1
        return "".join(f"<image-{first + i}>" for i in range(len(self.page_tiles[part.index])))


def tell_back(row: StoredSample, template: Template) -> Told:
    """The conversation of a row of a store of the variant `template`.

    Raises:
        UntoldError: it does not give the row's ids again.
    """
    videos = [
        ShownVideo(Fraction(video.duration_num, video.duration_den), video.times) for video in row.videos
    ]
    n_pictures = len(row.images) - sum(len(document.pages) for document in row.documents)
    turns = list(_turns(row, template, videos, n_pictures))
    own_system = turns[0].role == SYSTEM and turns[0].parts != (template.default_system,)
    if not own_system:
        turns = turns[1:]
    if not turns:
        raise UntoldError("it has no turn but the system's")
    tiles = [image.n_tiles for image in row.images]
    told = Told(
        Sample(
            tuple(turns),
            images=tuple(image.path for image in row.images[:n_pictures]),
            videos=tuple(VideoSource(video.path) for video in row.videos),
            documents=tuple(f"document {i}" for i in range(len(row.documents))),
        ),
        tiles[:n_pictures],
        videos,
        [tiles[d.first_image : d.first_image + len(d.pages)] for d in row.documents],
        own_system,
    )
    if told.encode(template) != row.ids.tolist():
        raise UntoldError("its ids are not those of its text")
    return told


def _turns(
    row: StoredSample, template: Template, videos: list[ShownVideo], n_pictures: int
) -> Iterator[Turn]:
    blocks = _blocks(row, template, videos, n_pictures)
    line_end = "\n" if template.variant == "train" else ""  # after a medium
    for runs in _runs(row.ids.tolist(), template.tokenizer):
        role, _, runs[0] = runs[0].partition("\n")
        parts: list[Any] = []
        ended = False
        for said, more in zip(runs, [True] * (len(runs) - 1) + [False], strict=True):
            text = said.removeprefix(line_end) if ended else said
            if more:
                label, shown, ended = next(blocks)
                if not text.endswith(label):
                    raise UntoldError("its labels of media are not those of its plan")
                text = text.removesuffix(label)
                parts += [text, *([] if shown in parts else [shown])]
            else:
                parts.append(text)
        yield Turn(role, tuple(part for part in parts if part != "") or ("",))


def _runs(ids: list[int], tokenizer: Tokenizer) -> Iterator[list[str]]:
    """Of each turn, the texts between its blocks of image tokens."""
    start, end, block, block_end = map(tokenizer.token_id, (IM_START, IM_END, IMG_START, IMG_END))
    place = 0
    while place < len(ids):
        if ids[place] != start:
            place += 1  # the line end between turns
            continue
        stop = ids.index(end, place)
        runs: list[str] = []
        text: list[int] = []
        inside = False
        for token in ids[place + 1 : stop]:
            if token == block:
                runs.append(tokenizer.decode(text))
                text, inside = [], True
            elif token == block_end:
                inside = False
            elif not inside:
                text.append(token)
        yield [*runs, tokenizer.decode(text)]
        place = stop + 1


def _blocks(
    row: StoredSample, template: Template, videos: list[ShownVideo], n_pictures: int
) -> Iterator[tuple[str, ImageRef | VideoRef | DocumentRef, bool]]:
    """Of each block of image tokens: the label before it, what it shows, whether it ends a medium."""
    document_of = {
        document.first_image + i: number
        for number, document in enumerate(row.documents)
        for i in range(len(document.pages))
    }
    labelled = n_pictures > 1 or row.documents or template.variant == "hf"
    for medium in row.media_order:
        if medium in document_of:
            yield image_label(medium + 1), DocumentRef(document_of[medium]), True
        elif medium >= 0:
            yield image_label(medium + 1) if labelled else "", ImageRef(medium), True
        else:
            index = -1 - medium
            times = videos[index].times
            for number, time in enumerate(times, 1):
                header = template.video_header(index, videos[index]) if number == 1 else ""
                yield header + template.frame_label(number, time), VideoRef(index), number == len(times)
