"""A video whose frames are given one by one: what is sampled, written, kept and decoded is one video."""

import json
import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_eagle.data.annotations.formats import read_sample
from megatron_eagle.data.annotations.parsing import Conventions
from megatron_eagle.data.inspection.preview_html import sample_page
from megatron_eagle.data.loading.media_reader import media_of_row
from megatron_eagle.data.media.decoder import MediaDecoder
from megatron_eagle.data.media.frame_list import common_clock, frame_list_name, frame_pictures
from megatron_eagle.data.media.source import file_metadata
from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.sample import FrameList
from megatron_eagle.data.sampling.ads import SamplingSettings
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.problems import Problem
from tests.data.helpers import call_tool, conversation, make_store, make_video

N = 12
SAMPLING = {"min_frames": 2}


@pytest.fixture
def frames(tmp_path):
    """Frame k is a picture of the grey 20 k; the names need sorting by number."""
    (tmp_path / "clip").mkdir()
    for k in range(N):
        Image.new("RGB", (40, 30), (20 * k,) * 3).save(tmp_path / "clip" / f"f{k}.png")
    return [f"clip/f{k}.png" for k in range(N)]


def read(record, root="/m", **conventions):
    conventions = Conventions(**conventions)
    return read_sample(json.dumps(record).encode(), root=root, file="f", line=1, conventions=conventions)


def greys(tiles):
    """Which frames tiles show."""
    return [round(float(tile.float().mean()) / 20) for tile in tiles]


LIST = ["a/1.jpg", "a/2.jpg", "b/3.jpg"]


@pytest.mark.parametrize(
    "record",
    [
        conversation("<video>", "x", video=LIST, fps=4),
        conversation("<image>", "x", video=LIST, fps=4),
        conversation("<video>", "x", video={"frames": LIST, "fps": 4}),
        conversation("<video>", "x", video={"path": LIST, "times": [0, 0.25, 0.5]}),
        conversation("<video>", "x", videos=[LIST], sample_fps="4"),
        conversation("<video>", "x", videos=[LIST], timestamps=[0, 0.25, "0.5"]),
        {
            "messages": [
                {"role": "user", "content": [{"type": "video", "video": LIST, "sample_fps": 4}]},
                {"role": "assistant", "content": "x"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "video", "video": LIST, "fps": 4}]},
                {"role": "assistant", "content": "x"},
            ]
        },
    ],
)
def test_one_video_however_it_is_written(record):
    (video,) = read(record).videos
    assert video.frames == FrameList(
        ("/m/a/1.jpg", "/m/a/2.jpg", "/m/b/3.jpg"), (Fraction(0), Fraction(1, 4), Fraction(1, 2))
    )
    assert (video.start, video.end) == (None, None)
    assert read(record).images == () and "fps" not in read(record).overrides


def test_the_rate_of_a_list_that_names_none():
    record = conversation("<video>", "x", video=LIST)
    assert read(record).videos[0].frames.times == (0, Fraction(1, 2), 1)
    assert read(record).videos[0].frames.assumed
    told = read(record, frames_fps=10).videos[0].frames
    assert told.times == (0, Fraction(1, 10), Fraction(1, 5)) and not told.assumed


def test_a_rate_that_nobody_named_is_noted(tmp_path, frames, tokenizer_dir, capsys):
    for more, noted in (({}, True), ({"recipe": {"frames_fps": 4}}, False)):
        make_store(tmp_path, tokenizer_dir, [conversation("<video>", "x", video=frames)], **more)
        note = (
            'note: entry "data" gives frames one by one and not their rate; they are taken for 2 per second'
        )
        assert (note in capsys.readouterr().out) == noted


def test_several_videos_stay_several():
    sample = read(conversation("<video><video>", "x", videos=["a.mp4", "b.mp4"]))
    assert [video.path for video in sample.videos] == ["/m/a.mp4", "/m/b.mp4"]
    sample = read(conversation("<video><video>", "x", videos=[LIST, LIST[:2]], fps=1))
    assert [len(video.frames.pictures) for video in sample.videos] == [3, 2]


@pytest.mark.parametrize(
    ("media", "reason"),
    [
        ({"video": LIST, "times": [0, 1]}, "bad setting: 3 frames need as many times"),
        ({"video": LIST, "times": [0, 1, 1]}, "bad setting: the times of frames must ascend"),
        ({"video": LIST, "times": [0, 1, "x"]}, "bad clip: times must be seconds"),
        ({"video": LIST, "fps": 0}, "bad setting: fps must be a positive number"),
        ({"videos": [LIST, "a.mp4"], "fps": 2}, "bad setting: fps beside frames"),
        ({"videos": [[]]}, "bad media reference: a video without frames"),
        ({"video": "a.mp4", "sample_fps": 2}, 'unsupported key: "sample_fps" where no frames'),
        ({"video": "a.mp4", "times": [1]}, 'unsupported key: "times" where no frames'),
        ({"video": {"path": LIST, "frames": ["c.jpg"]}}, "bad media reference: "),
    ],
)
def test_what_cannot_be_used_says_why(media, reason):
    with pytest.raises(Problem) as caught:
        read(conversation("hi", "x", **media))
    assert str(caught.value).startswith(reason)


def test_names(tmp_path):
    pictures = {0: "/a/b c/1?.jpg", 7: "/a/b c/d&=/2.jpg", 9: "/other/3.jpg", 10: "lmdb:///db?k%2F1"}
    name = frame_list_name(pictures)
    assert name.startswith("frames:///a/b c?0=") and frame_pictures(name) == pictures
    assert frame_pictures("/a/b.mp4") == {}


def test_clocks():
    assert common_clock((Fraction(0), Fraction(1, 3), Fraction(1, 2))) == (Fraction(1, 6), [0, 2, 3])
    base, times = common_clock((Fraction(0), Fraction(1, 10**10 + 1), Fraction(1, 7)))
    assert base == Fraction(1, 10**9) and times == [0, 0, 142857143]


def test_a_store_of_frame_lists(tmp_path, frames, tokenizer_dir, tokenizer):
    """Listed, in a folder, as a clip: the frames, their times, the text, the pixels of every decoder."""
    records = [
        conversation("<video>", "x", video=frames, fps=4),
        conversation("<video>", "x", video="clip", times=[k**2 for k in range(N)]),
        conversation("<video>", "x", video={"frames": frames, "fps": 4, "start": 1, "end": 2}),
        conversation("<video>", "x", video=frames, fps=4, max_frames=3),
    ]
    store = SampleStore(make_store(tmp_path, tokenizer_dir, records, (600,), sampling=SAMPLING))
    every, folder, clip, few = (store[row] for row in range(4))
    assert every.videos[0].frames == (0, 2, 4, 7, 9, 11)  # 2 a second of 3 seconds
    assert every.videos[0].times == [k / 4 for k in every.videos[0].frames]
    assert "The first video of 3.00 seconds at 2.00 fps" in tokenizer.decode(every.ids.tolist())
    assert folder.videos[0].frames == tuple(range(N)) and folder.videos[0].times[-1] == 121
    assert clip.videos[0].frames == (4, 7) and clip.videos[0].duration_num == clip.videos[0].duration_den
    assert few.videos[0].frames in ((0, 5, 11), (0, 6, 11))
    for backend in ("exact", "dali"):
        if backend == "dali":
            pytest.importorskip("nvidia.dali")
        decoder = MediaDecoder(backend, tile_size=store.manifest.tile_size)
        for row in range(4):
            (medium,) = media_of_row(store, row)
            tiles = medium.load(decoder)
            assert tiles.shape == (len(medium.plan.frames), 3, 28, 28) and tiles.dtype == torch.uint8
            assert greys(tiles) == list(medium.plan.frames)
            assert greys(medium.load(decoder, range(1, 2))) == [medium.plan.frames[1]]
        decoder.close()
    page = sample_page(store, 0)
    assert page.count("<img src=") == 6 and "6 frames of 3.00 s" in page and "frames://" not in page


def test_the_same_as_of_a_file(tmp_path, tokenizer_dir):
    """Frames of a file at their own times are sampled and told like the file."""
    from megatron_eagle.data.media.exact import upright_frames
    from megatron_eagle.data.media.frame_index import read_frame_table

    path = str(make_video(tmp_path / "v.mp4", 30))
    table = read_frame_table(path)
    names = []
    for k, frame in enumerate(upright_frames(path, table.index)):
        names.append(f"{k:03d}.png")
        Image.fromarray(frame).save(tmp_path / names[-1])
    times = [float(time) for time in table.index.times]
    records = [
        conversation("<video>", "x", video="v.mp4"),
        conversation("<video>", "x", video=names, times=times),
    ]
    store = SampleStore(make_store(tmp_path, tokenizer_dir, records, sampling=SAMPLING))
    file, listed = store[0], store[1]
    assert file.ids.tolist() == listed.ids.tolist()
    assert file.videos[0].frames == listed.videos[0].frames
    np.testing.assert_allclose(file.videos[0].times, listed.videos[0].times)
    decoder = MediaDecoder("exact", tile_size=28)
    tiles = [media_of_row(store, row)[0].load(decoder) for row in range(2)]
    assert torch.equal(*tiles)


def test_changes_and_damage_are_noticed(tmp_path, frames, tokenizer_dir):
    records = [
        conversation("<video>", "x", video=frames, fps=4),
        conversation("<video>", "x", video=[*frames, "clip/none.png"], fps=4),
        conversation("<video>", "x", video=[*frames, "cut.png"], fps=4),
    ]
    whole = (tmp_path / "clip/f3.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:60])
    store = SampleStore(make_store(tmp_path, tokenizer_dir, records, sampling=SAMPLING))
    ledger = [json.loads(line) for line in (tmp_path / "store" / "dropped.jsonl").open()]
    assert [(entry["line"], entry["kind"]) for entry in ledger] == [
        (2, "missing media"),
        (3, "unreadable image"),
    ]
    decoder = MediaDecoder("exact", tile_size=28)
    (medium,) = media_of_row(store, 0)
    shown, not_shown = tmp_path / "clip/f4.png", tmp_path / "clip/f3.png"
    assert 4 in medium.plan.frames and 3 not in medium.plan.frames
    not_shown.unlink()
    os.utime(shown, ns=(0, 0))  # the same bytes with another date
    assert greys(medium.load(decoder)) == list(medium.plan.frames)
    shown.write_bytes(whole.ljust(shown.stat().st_size, b"\0"))
    with pytest.raises(Problem, match="media changed since preprocessing"):
        medium.load(decoder)
    shown.unlink()
    with pytest.raises(Problem, match="missing media"):
        medium.load(decoder)


def test_a_store_of_frame_lists_is_kept(tmp_path, frames, tokenizer_dir, capsys):
    records = [conversation("<video>", "x", video=frames, fps=4)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "r.yaml").write_text("x: {annotation: a.json}")
    settings = PreprocessSettings(str(tokenizer_dir), (256,), SamplingSettings(tile_size=28, min_frames=2))
    for kept in (False, True):
        preprocess(tmp_path / "r.yaml", tmp_path / "store", settings, Execution(1))
        assert ("up to date" in capsys.readouterr().out) == kept
    name = SampleStore(tmp_path / "store")[0].videos[0].path
    assert file_metadata(name).size == sum(
        (tmp_path / f"clip/f{k}.png").stat().st_size for k in frame_pictures(name)
    )
    os.utime(tmp_path / "clip/f11.png", ns=(0, 2**62))
    preprocess(tmp_path / "r.yaml", tmp_path / "store", settings, Execution(1))
    assert "up to date" not in capsys.readouterr().out


def test_lint_looks_at_every_frame(tmp_path, frames):
    (tmp_path / "clip/f5.png").write_bytes(b"no picture")
    (tmp_path / "a.jsonl").write_text(json.dumps(conversation("<video>", "x", video="clip", fps=4)) + "\n")
    lint = call_tool("preview_data", "lint", tmp_path / "a.jsonl")
    assert lint.returncode == 1 and f"unreadable image: {tmp_path}/clip/f5.png" in lint.stdout
    (tmp_path / "empty").mkdir()
    with pytest.raises(Problem, match="is a folder without pictures"):
        read(conversation("<video>", "x", video="empty"), root=str(tmp_path))
