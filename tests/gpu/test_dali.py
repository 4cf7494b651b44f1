"""NVDEC on remuxed clips against the exact decoder: frames, colours, speed, memory.  Writes a card."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from megatron_eagle.data.media.decoder import MediaDecoder
from megatron_eagle.data.media.exact import read_frames
from megatron_eagle.data.media.frame_index import read_frame_table
from megatron_eagle.data.media.source import file_metadata, fingerprint
from megatron_eagle.data.sample import FrameList, VideoSource
from megatron_eagle.data.sampling.probe import probe_video
from megatron_eagle.hf_model.tiles import resize
from tests.data.helpers import frame_number, make_image, make_video
from tests.data.media.photos import bt601_rgb, make_photos
from tests.paths import REPO
from tools.benchmarks.report import Report

pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

S = 224
SIZE = (320, 240)
X265 = {"x265-params": "open-gop=0:bframes=2:log-level=none"}
CODECS = {
    "h264.mp4": ("libx264", {"bf": "3", "preset": "fast"}),
    "h264.mkv": ("libx264", {"bf": "0", "preset": "ultrafast"}),
    "hevc.mp4": ("libx265", X265),
    "vp8.webm": ("libvpx", {"auto-alt-ref": "0"}),
    "vp9.webm": ("libvpx-vp9", {"auto-alt-ref": "0"}),
}


@pytest.fixture(scope="module")
def free_memory():
    """Bytes free on the GPU before DALI takes any."""
    return torch.cuda.mem_get_info()[0]


@pytest.fixture(scope="module")
def gpu(free_memory):
    decoder = MediaDecoder("auto", tile_size=S, device="cuda", timeout=120)
    assert decoder.name == "dali"
    yield decoder
    decoder.close()


@pytest.fixture(scope="module")
def exact():
    return MediaDecoder("exact", tile_size=S)


@pytest.fixture(scope="module")
def rows():
    """What goes on the card, written when all tests are done."""
    measured = []
    yield measured
    if measured:
        command = "python -m pytest -m gpu tests/gpu/test_dali.py"
        card = Report("DALI on a GPU beside the exact decoder", measured).card("dali_gpu")
        card |= {"command": command, "gpu": torch.cuda.get_device_name()}
        (REPO / "examples/cards/dali_gpu.json").write_text(json.dumps(card, indent=2) + "\n")


def largest(tiles, others):
    return int((tiles.int() - others.int()).abs().max())


@pytest.mark.parametrize("name", CODECS)
def test_frames_are_the_right_ones(tmp_path, gpu, name):
    codec, options = CODECS[name]
    path = str(make_video(tmp_path / name, 120, size=SIZE, gop=24, codec=codec, options=options))
    index = read_frame_table(path).index
    for numbers in (range(120), [0, 1, 23, 24, 25, 60, 119], [119], [24]):
        tiles, _ = gpu.frames(path, index, numbers)
        assert [frame_number(tile.permute(1, 2, 0).numpy()) for tile in tiles] == list(numbers)
    assert not gpu.fallbacks


@pytest.mark.parametrize("name", CODECS)
def test_colours(tmp_path, gpu, exact, rows, name):
    codec, options = CODECS[name]
    path = make_photos(tmp_path / name, codec, n_frames=40, size=SIZE, gop=12, options=options)
    index = read_frame_table(path).index
    tiles, _ = gpu.frames(path, index, range(0, 40, 3))
    frames = read_frames(path, index.select(range(0, 40, 3)))
    reference = torch.stack([resize(bt601_rgb(frame), S, S) for frame in frames])
    to_exact = (tiles.int() - exact.frames(path, index, range(0, 40, 3))[0].int()).abs()
    rows.append(
        {
            "what": name,
            "max difference to BT.601": largest(tiles, reference),
            "max difference to exact": int(to_exact.max()),
            "mean difference to exact": float(to_exact.float().mean()),
        }
    )
    assert not gpu.fallbacks
    assert largest(tiles, reference) <= 3


def test_colour_tags_and_rotation(tmp_path, gpu, exact):
    path = make_photos(tmp_path / "bt709.mp4", "libx264", bt709=True, size=SIZE)
    index = read_frame_table(path).index
    tiles, _ = gpu.frames(path, index, [0, 7])
    difference = (tiles.int() - exact.frames(path, index, [0, 7])[0].int()).abs().float()
    assert difference.max() <= 12
    assert difference.mean() <= 1.5
    turned, _ = gpu.frames(path, replace(index, rotation=90), [0, 7])
    assert largest(turned, tiles.rot90(1, (2, 3))) <= 1


def test_pictures(tmp_path, gpu, exact):
    for name, grid in (("a.jpg", (3, 2)), ("b.jpg", (1, 1)), ("c.png", (2, 2))):
        path = str(make_image(tmp_path / name, (640, 400)))
        tiles, expected = (d.picture(path, grid, max_pixels=10**7).int() for d in (gpu, exact))
        difference = (tiles - expected).abs()
        assert difference.max() <= 10
        assert difference.float().mean() <= 1
    assert not gpu.fallbacks


def test_frames_given_one_by_one(tmp_path, gpu, exact):
    """A video of JPEG and PNG pictures: each as DALI and the exact decoder read a picture."""
    names = [f"{k}.{('jpg', 'png')[k % 2]}" for k in range(5)]
    pictures = tuple(str(make_image(tmp_path / name, (640, 400), k)) for k, name in enumerate(names))
    frames = FrameList(pictures, tuple(Fraction(k, 2) for k in range(5)))
    video = probe_video(VideoSource(str(tmp_path), frames=frames))
    name = video.name(range(5))
    file = file_metadata(name)
    index = replace(video.table.index, file=file, fingerprint=fingerprint(name))
    tiles, expected = (decoder.frames(name, index, [0, 3, 4])[0].int() for decoder in (gpu, exact))
    difference = (tiles - expected).abs()
    assert tiles.shape == (3, 3, S, S) and difference.max() <= 10 and difference.float().mean() <= 1
    assert not gpu.fallbacks


def test_what_nvdec_refuses_is_decoded_exactly(tmp_path, gpu, exact):
    """Too small for its HEVC decoder: DALI raises, is rebuilt, and goes on with the next clip."""
    small = str(make_video(tmp_path / "small.mp4", 20, size=(64, 64), codec="libx265", options=X265))
    index = read_frame_table(small).index
    assert gpu.frames(small, index, [3, 17])[0].equal(exact.frames(small, index, [3, 17])[0])
    assert sum(gpu.fallbacks.values()) == 1
    good = str(make_video(tmp_path / "good.mp4", 20, size=SIZE))
    tiles, _ = gpu.frames(good, read_frame_table(good).index, [3, 17])
    assert [frame_number(tile.permute(1, 2, 0).numpy()) for tile in tiles] == [3, 17]
    assert sum(gpu.fallbacks.values()) == 1
    gpu.fallbacks.clear()


def test_speed_and_memory(tmp_path, gpu, exact, rows, free_memory):
    """64 frames of each of eight 1080p clips, asked for by eight threads at the same time."""
    options = {"preset": "veryfast", "bf": "2"}
    first = make_photos(
        tmp_path / "0.mp4", "libx264", n_frames=600, size=(1920, 1080), gop=60, options=options
    )
    index = read_frame_table(first).index
    numbers = np.linspace(0, 599, 64).round().astype(int)
    for decoder in (gpu, exact):
        decoder.frames(first, index, numbers)  # warm up
        cpu, begin = time.process_time(), time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            tiles = list(pool.map(lambda _, d=decoder: d.frames(first, index, numbers)[0], range(8)))
        seconds = time.perf_counter() - begin
        rows.append(
            {
                "what": f"8 x 64 frames of 1080p, {decoder.name}",
                "frames per second": round(8 * 64 / seconds, 1),
                "CPU seconds": round(time.process_time() - cpu, 2),
                "GPU memory taken, MB": round((free_memory - torch.cuda.mem_get_info()[0]) / 1e6),
            }
        )
        assert all(other.equal(tiles[0]) for other in tiles)
    assert not gpu.fallbacks
