"""Preprocessing: one process, several, three lengths in one pass, beside the loop that one writes first.

The input is made here: pictures of 1280x720, clips of 10 s, and text, in equal parts; tiles of 448 pixels.
The naive loop plans one length: it decodes every picture and cuts it into tiles, decodes every clip from its
start to its end, takes frames evenly until they fit, and tokenises the whole text again for each try.
"""

import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import av
import numpy as np
from benchmarks.report import Report, progress
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.text.tokenizer import RESERVED
from megatron_eagle.hf_model.grids import select_grid

TILE, TOKENS_PER_TILE = 448, 256
LENGTHS = (4096, 8192, 16384)
PICTURES, CLIPS = 12, 3  # different ones; every sample uses one of them
SENTENCE = "What is shown here, and what happens next? A boat crosses the lake in 12 minutes. "


def make_input(folder: Path, count: int) -> None:
    """Media, `count` annotations, a recipe and a tokenizer."""
    generator = np.random.default_rng(0)
    for k in range(PICTURES):
        noise = generator.integers(0, 256, (90, 160, 3), np.uint8)
        Image.fromarray(noise).resize((1280, 720), Image.Resampling.BILINEAR).save(folder / f"{k}.jpg")
    for k in range(CLIPS):
        _make_clip(folder / f"{k}.mp4", generator)
    with (folder / "data.jsonl").open("w") as out:
        for k in range(count):
            media = ({}, {"image": f"{k % PICTURES}.jpg"}, {"video": f"{k % CLIPS}.mp4"})[k % 3]
            question = f"{k}. {SENTENCE * (1 + k % 20)}"
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": SENTENCE}]
            out.write(json.dumps({"conversations": turns, **media}) + "\n")
    (folder / "recipe.json").write_text('{"data": {"annotation": "data.jsonl"}}')
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    """Write a small tokenizer, in its folder `tokenizer`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=sorted(RESERVED),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCE] * 10, trainer)
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))


def _make_clip(path: Path, generator: np.random.Generator) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        stream.options = {"preset": "ultrafast"}
        picture = generator.integers(0, 256, (360, 640, 3), np.uint8)
        for k in range(250):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 8 * k, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def run_ours(folder: Path, lengths: tuple[int, ...], workers: int) -> None:
    """One run of this project's preprocessing, from nothing."""
    settings = PreprocessSettings(str(folder / "tokenizer"), lengths)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        preprocess(folder / "recipe.json", folder / "store", settings, Execution(workers, fresh=True))


def run_naive(folder: Path) -> None:
    """The loop that one writes first, for one length."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    rows = []
    for line in (folder / "data.jsonl").read_text().splitlines():
        record = json.loads(line)
        n_frames = n_tiles = 0
        if "image" in record:
            image = Image.open(folder / record["image"]).convert("RGB")
            columns, height = select_grid(*image.size, tile_size=TILE, max_tiles=12)
            whole = np.asarray(image.resize((columns * TILE, height * TILE), Image.Resampling.BICUBIC))
            tiles = whole.reshape(height, TILE, columns, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
            n_tiles = len(tiles) + 1
        if "video" in record:
            with av.open(str(folder / record["video"])) as container:
                shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            n_frames = min(len(shown), 20)
        while len(ids := tokenizer.encode(_naive_text(record, n_tiles, n_frames)).ids) > LENGTHS[0]:
            n_frames -= 1
        rows.append(np.array(ids, np.int32))
    np.concatenate(rows).tofile(folder / "naive.bin")


def _naive_text(record: dict[str, Any], n_tiles: int, n_frames: int) -> str:
    def block(tiles: int) -> str:
        return "<img>" + "<IMG_CONTEXT>" * (TOKENS_PER_TILE * tiles) + "</img>"

    media = block(n_tiles) if n_tiles else "".join(f"Frame {k}: {block(1)}" for k in range(1, n_frames + 1))
    question, answer = (turn["value"] for turn in record["conversations"])
    return f"<|im_start|>user\n{media}{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


def run(large: bool = False) -> Report:
    """Measure every way of doing it on the same input."""
    count = 600 if large else 120
    workers = min(4, os.cpu_count() or 1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        progress(f"making the media of {count} samples")
        make_input(folder, count)
        first, every = LENGTHS[:1], LENGTHS
        ways: dict[str, tuple[int, int, Callable[[], object]]] = {
            "ours": (1, 1, lambda: run_ours(folder, first, 1)),
            f"ours, {workers} workers": (workers, 1, lambda: run_ours(folder, first, workers)),
            "naive loop": (1, 1, lambda: run_naive(folder)),
            "ours, one pass": (1, 3, lambda: run_ours(folder, every, 1)),
            "ours, a pass per length": (1, 3, partial(_run_each, folder, every)),
        }
        for way, (processes, lengths, function) in ways.items():
            progress(way)
            wall, cpu = _timed(function)
            rows.append(
                {
                    "way": way,
                    "processes": processes,
                    "lengths": lengths,
                    "samples": count,
                    "wall s": wall,
                    "CPU s": cpu,
                    "samples per s": count / wall,
                }
            )
    title = "text, pictures of 1280x720 and clips of 10 s in equal parts, tiles of 448 pixels"
    return Report(title, rows, "--large" * large)


def _run_each(folder: Path, lengths: Sequence[int]) -> None:
    for length in lengths:
        run_ours(folder, (length,), 1)


def _timed(function: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds, processes that it started and ended included."""

    def cpu() -> float:
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    wall, before = time.perf_counter(), cpu()
    function()
    return time.perf_counter() - wall, cpu() - before
