"""Preprocessing: ways of doing it beside the loop that one writes first; containers beside peers; growth.

The ways have an input of pictures of 1280x720, clips of 10 s, and text, in equal parts; tiles of 448 pixels.
The naive loop plans one length: it decodes every picture and cuts it into tiles, decodes every clip from its
start to its end, takes frames evenly until they fit, and tokenises the whole text again for each try.

The containers have the same pictures (see `containers`), then more and more small ones: what memory does.
Each run is a process of its own.
"""

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import av
import numpy as np
from benchmarks.containers import CONTAINERS, PEERS, SIZE, SMALL, pictures
from benchmarks.own_process import in_own_process
from benchmarks.report import Report, progress
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.text.tokenizer import RESERVED
from megatron_eagle.files import split_lines
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
            question = f"{k}. {SENTENCE * (1 + k % 20)}"
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": SENTENCE}]
            out.write(json.dumps({"conversations": turns, **_media(k)}) + "\n")
    (folder / "recipe.json").write_text('{"data": {"annotation": "data.jsonl"}}')
    make_tokenizer(folder)


def _media(k: int) -> dict[str, str]:
    return ({}, {"image": f"{k % PICTURES}.jpg"}, {"video": f"{k % CLIPS}.mp4"})[k % 3]


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


def run_ours(folder: Path, lengths: Sequence[int], workers: int = 1) -> int:
    """One run of this project's preprocessing, from nothing; how many samples it kept."""
    settings = PreprocessSettings(str(folder / "tokenizer"), tuple(lengths))
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        manifest = preprocess(
            folder / "recipe.json", folder / "store", settings, Execution(workers, fresh=True)
        )
    return int(manifest.counts[str(lengths[0])]["kept"])


def run_each(folder: Path, lengths: Sequence[int]) -> int:
    """A run for each length."""
    return [run_ours(folder, (length,)) for length in lengths][0]


def run_naive(folder: Path) -> int:
    """The loop that one writes first, for one length."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    rows = []
    for line in split_lines((folder / "data.jsonl").read_text()):
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
    return len(rows)


def _naive_text(record: dict[str, Any], n_tiles: int, n_frames: int) -> str:
    def block(tiles: int) -> str:
        return "<img>" + "<IMG_CONTEXT>" * (TOKENS_PER_TILE * tiles) + "</img>"

    media = block(n_tiles) if n_tiles else "".join(f"Frame {k}: {block(1)}" for k in range(1, n_frames + 1))
    question, answer = (turn["value"] for turn in record["conversations"])
    return f"<|im_start|>user\n{media}{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


def run(large: bool = False) -> Report:
    """Samples and megabytes per second, and the most memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _ways(folder, 300 if large else 120)
        rows += _containers(folder, 1000 if large else 200)
        rows += _growth(folder, large)
    title = "a mix of text, pictures and clips in several ways; pictures of 960x640 out of containers; growth"
    return Report(title, rows, "--large" * large)


def _ways(folder: Path, count: int) -> list[dict[str, Any]]:
    progress(f"making the media of {count} samples")
    make_input(folder, count)
    workers = min(4, os.cpu_count() or 1)
    sizes = [sum((folder / name).stat().st_size for name in _media(k).values()) for k in range(count)]
    first, every = LENGTHS[:1], LENGTHS
    ways: dict[str, tuple[int, int, Callable[..., int], tuple[Any, ...]]] = {
        "ours": (1, 1, run_ours, (folder, first)),
        f"ours, {workers} workers": (workers, 1, run_ours, (folder, first, workers)),
        "naive loop": (1, 1, run_naive, (folder,)),
        "ours, one pass": (1, 3, run_ours, (folder, every)),
        "ours, a pass per length": (1, 3, run_each, (folder, every)),
    }
    return [
        _row("files, a mix", way, processes, lengths, count, sum(sizes) / 1e6, function, *arguments)
        for way, (processes, lengths, function, arguments) in ways.items()
    ]


def _containers(folder: Path, count: int) -> list[dict[str, Any]]:
    rows = []
    megabytes = sum(map(len, pictures(count, SIZE))) / 1e6
    for container, make in CONTAINERS.items():
        progress(f"making {container}")
        entry = make(folder, count, SIZE)
        (folder / "recipe.json").write_text(json.dumps({"data": entry}))
        rows.append(_row(container, "ours", 1, 1, count, megabytes, run_ours, folder, (8192,)))
        name, function = PEERS.get(container, ("", None))
        if function is not None and importlib.util.find_spec(name):
            way = f"{name}, decoding only"
            rows.append(_row(container, way, 1, 1, count, megabytes, function, folder, entry))
    return rows


def _growth(folder: Path, large: bool) -> list[dict[str, Any]]:
    rows = []
    for container in ("files", "LMDB", "tar", "parquet"):
        most = (100_000,) if container == "parquet" else ()
        for count in (1_000, 10_000, *most) if large else (500, 2_000):
            with tempfile.TemporaryDirectory(dir=folder) as name:
                grown = Path(name)
                (grown / "tokenizer").symlink_to(folder / "tokenizer")
                progress(f"making {container}")
                entry = CONTAINERS[container](grown, count, SMALL)
                (grown / "recipe.json").write_text(json.dumps({"data": entry}))
                megabytes = sum(map(len, pictures(count, SMALL))) / 1e6
                what = f"{container}, pictures of 64x48"
                rows.append(_row(what, "ours", 1, 1, count, megabytes, run_ours, grown, (8192,)))
    return rows


def _row(
    source: str,
    way: str,
    processes: int,
    lengths: int,
    count: int,
    megabytes: float,
    function: Callable[..., int],
    *arguments: Any,
) -> dict[str, Any]:
    progress(f"{source}: {way}, {count:,} samples")
    samples, used = in_own_process(function, *arguments)
    if samples != count:
        raise RuntimeError(f"{source}: {way} has {samples} samples of {count}")
    return {
        "from": source,
        "way": way,
        "processes": processes,
        "lengths": lengths,
        "samples": count,
        "MB of media": megabytes,
        "wall s": used.wall,
        "CPU s": used.cpu,
        "samples per s": count / used.wall,
        "samples per CPU s": count / used.cpu,
        "MB per CPU s": megabytes / used.cpu,
        "peak MB": used.peak,
        "anonymous MB": used.anonymous,
    }
