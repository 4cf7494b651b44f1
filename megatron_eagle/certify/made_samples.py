"""A small token store of made samples: the kinds of prompts in which training and serving have parted before.

Drawn and written by arithmetic alone, so that every machine makes the same ones: pictures of odd shapes, one
and several of them, a page, a clip, text that spells special tokens, several turns, and a long text.
"""

import contextlib
import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.sampling.ads import SamplingSettings
from megatron_eagle.data.text.tokenizer import load_tokenizer
from megatron_eagle.errors import UserError
from megatron_eagle.files import split_lines

BEYOND = 32_768  # positions that a certificate must reach
_MORE = 64  # tokens of a long text beyond them
_LENGTH = 16_384  # of the other samples, at most
LINES = ("typed tokens", "odd pictures", "page", "several turns", "video", "clip and picture", "long text")
_TYPED = "Say <|im_end|> and <|im_start|>user\n<img><IMG_CONTEXT></img> <|endoftext|>\u00e9 e\u0301 12."


def make_store(folder: Path, export: Path, sampling: SamplingSettings, patch_size: int, longest: int) -> Path:
    """Write the samples and their store below `folder`; returns the store.

    Args:
        export: with the tokenizer.
        sampling: as the export cuts pictures.
        longest: tokens of a sample; one that exceeds `BEYOND` is made where it allows that.

    Raises:
        UserError: some sample does not fit.
    """
    side = sampling.tile_size
    _picture(side * 23 // 10, side * 9 // 10, 0).save(folder / "wide.png")
    _picture(side // 3, side * 17 // 10, 1).save(folder / "tall.png")
    _picture(side * 5 // 4 + 1, side * 5 // 4 - 3, 2).save(folder / "square.jpg", quality=90)
    _page(side * 17 // 10, side * 22 // 10).save(folder / "page.png")
    _clip(folder / "clip.mp4", 44)
    _clip(folder / "other.mp4", 25, shift=7)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as lines:
        for turns in _conversations(export, longest):
            lines.write(json.dumps({"messages": turns}) + "\n")
    (folder / "recipe.json").write_text('{"made": {"annotation": "samples.jsonl"}}')
    length = longest if longest > BEYOND + _MORE else min(longest, _LENGTH)
    settings = PreprocessSettings(str(export), (length,), sampling, patch_size, template="hf")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        preprocess(folder / "recipe.json", folder / "store", settings, Execution(workers=1))
        dropped = [json.loads(line) for line in split_lines((folder / "store" / "dropped.jsonl").read_text())]
        if not dropped:
            write_packs(folder / "store", length, 0)
    if dropped:
        first = dropped[0]
        raise UserError(
            f"the made sample {LINES[first['line'] - 1]!r} does not fit this model: {first['reason']}"
        )
    return folder / "store"


def _conversations(export: Path, longest: int) -> list[list[dict[str, Any]]]:
    def image(name: str) -> dict[str, Any]:
        return {"type": "image", "image": name}

    def asked(*parts: Any, answer: str = "A drawing.") -> list[dict[str, Any]]:
        content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]

    video = {"type": "video", "video": "clip.mp4", "nframes": 8}
    clip = {"type": "video", "video": "other.mp4", "nframes": 8, "video_start": 0.3, "video_end": 1.9}
    made = [
        asked(_TYPED, answer="It says <|im_end|> and <image-1>."),
        asked("Compare ", image("wide.png"), " with ", image("tall.png"), image("square.jpg"), "\nWhich?"),
        asked(image("page.png"), "What is written there?"),
        [
            {"role": "system", "content": "Answer in one word."},
            *asked(image("square.jpg"), "  What is it? "),
            *asked("And this?", image("tall.png")),
        ],
        asked(video, "What happens?"),
        asked("First ", clip, " then ", image("wide.png"), " and ", video, "?"),
    ]
    if longest > BEYOND + _MORE:
        made.append(asked(_long_text(export), answer="As it is said."))
    return made


def _long_text(export: Path) -> str:
    """Numbered sentences of more than `BEYOND` tokens."""
    tokenizer = load_tokenizer(export)
    sentences = [f"Page {i} of the book tells of place {i * i % 97}. " for i in range(BEYOND // 4)]
    fewest, most = 1, len(sentences)
    while fewest < most:  # a prefix that is just long enough
        middle = (fewest + most) // 2
        enough = len(tokenizer.encode("".join(sentences[:middle]))) >= BEYOND
        fewest, most = (fewest, middle) if enough else (middle + 1, most)
    return "".join(sentences[:fewest])


def _picture(width: int, height: int, kind: int) -> Image.Image:
    """Gradients and stripes without two equal rows or columns."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * x // max(1, width - 1), 255 * y // max(1, height - 1)
    blue = (x * (3 + kind) + y * (5 - kind)) % 256
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


def _page(width: int, height: int) -> Image.Image:
    """White, with lines of dark bars as words."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    step = max(6, height // 40)
    for line, top in enumerate(range(2 * step, height - 2 * step, step)):
        for word, left in enumerate(range(step, width - 2 * step, step)):
            if (line * 7 + word * 5) % 6:
                pixels[top : top + step // 3, left : left + step - 2] = 20 + 10 * (word % 7)
    return Image.fromarray(pixels)


def _clip(path: Path, n_frames: int, shift: int = 0) -> None:
    """Ten frames a second; each says by bars which it is."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for number in range(n_frames):
            bars = [255 * ((number + shift) >> bit & 1) for bit in range(8)]
            row = np.repeat(np.array(bars, np.uint8), 20)
            pixels = np.stack([np.broadcast_to(row, (96, 160))] * 3, -1)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
