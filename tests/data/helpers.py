"""What the data tests share: a small tokenizer, pictures, clips whose frames can be told apart, records."""

import io
import json
import runpy
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from fractions import Fraction
from pathlib import Path
from unittest import mock

import av
import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_eagle.data.loading.media_reader import media_of_row
from megatron_eagle.data.loading.packs import TilesAlone, TokenPack
from megatron_eagle.data.media.decoder import MediaDecoder
from megatron_eagle.data.media.frame_table import FrameIndex
from megatron_eagle.data.media.video import decode_frames
from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.sampling.ads import SamplingSettings
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.hf_model.tiles import normalize
from tests.paths import REPO

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<interval>",
    "</interval>",
)
# Qwen2.5's splitting: digits one by one, line ends apart from words.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = [
    "system user assistant You are a helpful assistant. You are an AI assistant whose name is Eagle-Next.",
    "The first video of seconds at fps: Frame sample at What is shown in the picture? A cat and a cup.",
]


def make_tokenizer(folder: Path) -> Path:
    """Train a byte-level BPE tokenizer of about 450 entries and save it in `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 3, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def make_sentencepiece(folder: Path) -> Path:
    """Train a sentencepiece model of about 330 entries and save it in `folder`."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_CORPUS * 20),
            model_writer=model,
            model_type="bpe",
            vocab_size=350,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=list(SPECIAL[:-2]),
            control_symbols=[SPECIAL[-2]],
            minloglevel=2,
        )
    (folder / "added_tokens.json").write_text(json.dumps({SPECIAL[-1]: 400}))
    return folder


def make_image(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    """A smooth random picture of `size` (width, height); the suffix names the format."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def frame_number(frame: np.ndarray) -> int:
    """The number that `make_video` drew into a frame [h, w, 3]: eight vertical bars, one per bit."""
    bars = frame[frame.shape[0] // 4 : -frame.shape[0] // 4].mean(axis=(0, 2))
    width = frame.shape[1] // 8
    return sum(
        (bars[i * width + width // 4 : (i + 1) * width - width // 4].mean() > 128) << i for i in range(8)
    )


def make_video(
    path: Path,
    n_frames: int = 30,
    *,
    fps: int = 10,
    size: tuple[int, int] = (128, 64),
    codec: str = "libx264",
    gop: int = 12,
    pts: list[int] | None = None,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    colours: tuple[tuple[int, int, int], tuple[int, int, int]] = ((0, 0, 0), (255, 255, 255)),
    movflags: str = "",
    sound_first: bool = False,
) -> Path:
    """A clip whose frame k shows k as eight vertical bars; `pts` (1/1000 s) makes its frame rate variable.

    `options` are the encoder's; `colours` are those of bits that are 0 and 1, the second the brighter;
    `movflags` are the MP4 muxer's; `sound_first` puts a silent track before the video.
    """
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        sound = container.add_stream("aac", rate=8000) if sound_first else None
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.gop_size = gop
        time_base = Fraction(1, 1000) if pts else Fraction(1, fps)
        stream.codec_context.time_base = time_base
        if codec == "libx264":
            stream.options = {"bf": "2", "crf": "20", "preset": "ultrafast"}
        if options:
            stream.options |= options
        for k in range(n_frames):
            bars = np.array([colours[k >> i & 1] for i in range(8)], np.uint8)
            picture = np.broadcast_to(np.repeat(bars, size[0] // 8, 0), (size[1], size[0], 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = pts[k] if pts else k
            frame.time_base = time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
            silence.sample_rate = 8000
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return path


def make_pdf(path: Path, n_pages: int = 1, *, size: tuple[int, int] = (595, 842), extra: str = "") -> Path:
    """A PDF file whose page k (from 0) shows k as eight vertical bars; `extra` goes into its trailer."""
    width, height = size
    kids = " ".join(f"{4 + 2 * k} 0 R" for k in range(n_pages))
    objects = ["<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Count {n_pages}/Kids[{kids}]>>", "<<>>"]
    for k in range(n_pages):
        black = (f"{i * width / 8} 0 {width / 8} {height} re f" for i in range(8) if not k >> i & 1)
        drawing = f"0 g {' '.join(black)}"
        objects.append(f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 {width} {height}]/Contents {5 + 2 * k} 0 R>>")
        objects.append(f"<</Length {len(drawing)}>>stream\n{drawing}\nendstream")
    return write_pdf(path, [text.encode() for text in objects], extra)


def write_pdf(path: Path, objects: list[bytes], extra: str = "") -> Path:
    """A PDF file of these objects, numbered from 1; the first is its catalog."""
    content, places = bytearray(b"%PDF-1.4\n"), []
    for number, text in enumerate(objects, 1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, text)
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    end += f"trailer<</Size {len(objects) + 1}/Root 1 0 R{extra}>>\nstartxref\n{len(content)}\n%%EOF\n"
    path.write_bytes(bytes(content) + end.encode())
    return path


def write_jsonl(path: Path, records: list) -> Path:
    """One record a line; a string is written as it is (for broken lines)."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def conversation(question: str, answer: str, **media) -> dict:
    """A LLaVA-style record with one question and one answer."""
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **media,
    }


def run_tool(name: str, *arguments) -> subprocess.CompletedProcess:
    """Run tools/NAME.py as a user does."""
    command = [sys.executable, str(REPO / "tools" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def call_tool(name: str, *arguments) -> subprocess.CompletedProcess:
    """Run tools/NAME.py in this process, which spares its imports."""
    argv = [str(REPO / "tools" / f"{name}.py"), *map(str, arguments)]
    out, errors = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(errors):
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code or 0
    return subprocess.CompletedProcess(argv, code, out.getvalue(), errors.getvalue())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make_store(
    folder: Path,
    tokenizer_dir: Path,
    records: list | dict[str, list],
    lengths: tuple[int, ...] = (256,),
    **settings,
) -> Path:
    """Preprocess records whose media lie in `folder`, with tiles of 28 pixels, one token each (`sampling` may
    say otherwise).

    `records` are those of one data set, or of several by name.
    """
    common, recipe = settings.pop("recipe", {}), {}
    for name, own in (records if isinstance(records, dict) else {"data": records}).items():
        write_jsonl(folder / f"{name}.jsonl", own)
        recipe[name] = {"annotation": f"{name}.jsonl", **common}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    sampling = SamplingSettings(**{"tile_size": 28, **settings.pop("sampling", {})})
    execution = Execution(settings.pop("workers", 1), fresh=True)
    chosen = PreprocessSettings(str(tokenizer_dir), lengths, sampling, **settings)
    preprocess(folder / "recipe.json", folder / "store", chosen, execution)
    return folder / "store"


def load_frames(source: str, index: FrameIndex, numbers: Sequence[int], *, tile_size: int) -> torch.Tensor:
    """Frames as the model sees them: tiles float32 [n, 3, S, S] in [-1, 1]."""
    return normalize(decode_frames(source, index, numbers, size=tile_size)[0])


def read_media(store: SampleStore, row: int) -> list[torch.Tensor]:
    """The tiles of each medium of a row, in reading order: float32 in [-1, 1]."""
    decoder = MediaDecoder("exact", tile_size=store.manifest.tile_size)
    return [normalize(medium.load(decoder)) for medium in media_of_row(store, row)]


def every_tile(tokens: TokenPack) -> TilesAlone:
    """The plan of a rank that decodes all tiles of its packs."""
    return TilesAlone(range(tokens.n_tiles))
