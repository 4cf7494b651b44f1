"""Small copies of videos: every frame at its exact time, upright, cheap to seek; resumed, and verified."""

import errno
import json
import os
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace

from megatron_eagle.data.annotations.formats import read_sample
from megatron_eagle.data.annotations.rewrite import replace_videos
from megatron_eagle.data.media import transcode as one
from megatron_eagle.data.media.frame_index import read_frame_table
from megatron_eagle.data.media.transcode import TranscodeSettings, transcode_video
from megatron_eagle.data.media.video import decode_frames
from megatron_eagle.data.preparation.journal import lock_file
from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.preparation.transcode import transcode
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem
from tests.data.helpers import call_tool, conversation, frame_number, make_image, make_video, write_jsonl
from tests.paths import MEDIA, REPO, need_media

SMALL = TranscodeSettings(size=64, gop=4)


def times(path):
    """Exact presentation times of all frames, in seconds."""
    table = read_frame_table(str(path))
    return [int(pts) * table.time_base for pts in table.pts]


def numbers(path, wanted):
    """The numbers drawn into some frames of a copy."""
    tiles, _ = decode_frames(str(path), read_frame_table(str(path)).index, wanted, size=64)
    return [frame_number(tile.permute(1, 2, 0).numpy()) for tile in tiles]


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
def test_frames_and_times_are_kept(tmp_path, codec):
    """Of a variable frame rate that starts late, in another container and time base."""
    pts = [40, *np.cumsum(np.random.default_rng(0).integers(1, 300, 29)).tolist()]
    pts = sorted({*pts, 9999})
    source = make_video(tmp_path / "v.mkv", len(pts), pts=pts)
    target = tmp_path / "sub" / "copy.mp4"
    n = transcode_video(str(source), target, TranscodeSettings(size=64, gop=4, codec=codec))
    assert n == len(pts)
    assert times(target) == times(source) == [Fraction(t, 1000) for t in pts]
    table = read_frame_table(str(target))
    assert len(table.keyframes) == -(-n // 4) and not table.open_gop and not table.linear_reason
    assert (np.diff(np.searchsorted(table.pts, table.keyframes)) == 4).all()
    assert numbers(target, range(n)) == list(range(n))
    with av.open(str(target)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.sample_aspect_ratio) == (64, 64, 2)
    assert [path.name for path in target.parent.iterdir()] == ["copy.mp4"]


@pytest.mark.parametrize(
    "codec, said",
    [("h264", b" threads=1 lookahead_threads=1 "), ("hevc", b" frame-threads=1 numa-pools=none no-wpp ")],
)
def test_nothing_follows_from_the_machines_cores(tmp_path, codec, said):
    """What the encoders say of themselves in the copy."""
    source = make_video(tmp_path / "a.mp4", 5)
    transcode_video(str(source), tmp_path / "b.mp4", TranscodeSettings(size=64, gop=4, codec=codec))
    assert said in (tmp_path / "b.mp4").read_bytes()


def test_no_frame_gets_larger(tmp_path):
    source = make_video(tmp_path / "v.mp4", 5, size=(128, 34))
    transcode_video(str(source), tmp_path / "c.mp4", SMALL)
    with av.open(str(tmp_path / "c.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (64, 34)
        assert stream.sample_aspect_ratio * stream.width / stream.height == Fraction(128, 34)


def looks(path, size=128):
    """Three frames of a file, as tiles."""
    index = read_frame_table(str(path)).index
    shown = np.linspace(0, index.n_frames - 1, 3).astype(int)
    return decode_frames(str(path), index, shown, size=size)[0].float()


@need_media
@pytest.mark.parametrize(
    "name", ["decord_rot90.mov", "decord_unordered.mov", "tc_av1.mkv", "tc_h265_10bit.mp4", "lf_2.avi"]
)
def test_real_files(tmp_path, name):
    """Rotation, B-frames, AV1, 10 bits, AVI: the copy looks like the source, at the same times."""
    source, target = MEDIA / "video" / name, tmp_path / "c.mp4"
    transcode_video(str(source), target, TranscodeSettings(size=128, crf=10))
    assert times(target) == times(source)
    assert read_frame_table(str(target)).rotation == 0
    difference = looks(target) - looks(source)  # large only at edges of pure colours
    assert difference.abs().median() <= 2 and difference.mean().abs() < 1


@pytest.mark.parametrize("space", ["ITU601", "ITU709"])
@pytest.mark.parametrize("levels", ["MPEG", "JPEG"])
def test_colours_are_kept(tmp_path, space, levels):
    """Whichever matrix and range the source codes them in."""
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.options = {"crf": "1"}
        coder = stream.codec_context
        coder.colorspace, coder.color_range = Colorspace[space], ColorRange[levels]
        for colour in ((250, 10, 10), (20, 230, 40), (15, 25, 240)):
            picture = np.broadcast_to(np.array(colour, np.uint8), (64, 64, 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=space, dst_color_range=levels)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    transcode_video(str(tmp_path / "v.mp4"), tmp_path / "c.mp4", TranscodeSettings(size=64, crf=1))
    before, after = looks(tmp_path / "v.mp4"), looks(tmp_path / "c.mp4")
    assert (before.mean((2, 3)).argmax(1) == torch.tensor([0, 1, 2])).all()
    assert (before - after).abs().max() <= 4


@need_media
def test_audio_is_dropped_or_copied(tmp_path):
    source = str(MEDIA / "video" / "skv_bigbuckbunny.mp4")
    found = {}
    for audio in ("drop", "copy"):
        target = tmp_path / f"{audio}.mp4"
        transcode_video(source, target, TranscodeSettings(size=64, audio=audio))
        assert times(target) == times(source)
        with av.open(str(target)) as container:
            found[audio] = [bytes(packet) for s in container.streams.audio for packet in container.demux(s)]
    with av.open(source) as container:
        packets = [bytes(packet) for packet in container.demux(container.streams.audio[0])]
    assert found == {"drop": [], "copy": packets}


def test_what_is_not_exact_is_refused(tmp_path, monkeypatch):
    """An encoder that loses a frame, or shows one later, is noticed, and nothing is left behind."""
    source = make_video(tmp_path / "v.mkv", 20, pts=[100 * k for k in range(20)])
    fewer = make_video(tmp_path / "fewer.mkv", 19, pts=[100 * k for k in range(19)])
    later = make_video(tmp_path / "later.mkv", 20, pts=[100 * k + (k == 7) for k in range(20)])
    real = one._encode
    for other in (fewer, later):
        monkeypatch.setattr(
            one, "_encode", lambda _, __, *rest, o=str(other): real(o, read_frame_table(o), *rest)
        )
        with pytest.raises(Problem, match="times not kept: .*v.mkv: 1 of 20 frames"):
            transcode_video(str(source), tmp_path / "c.mp4", SMALL)
    assert {path.name for path in tmp_path.iterdir()} == {"v.mkv", "fewer.mkv", "later.mkv"}


DIALECTS = [
    conversation("<video>", "x", video="v.mp4"),
    conversation("<video>", "x", video={"video": "v.mp4", "start": 1, "end": "2.5"}),
    conversation("<video> <video>", "x", video=["v.mp4", {"path": "./w.mp4", "end": 2}]),
    conversation("<video>", "x", videos=["w.mp4"], note="é"),
    conversation("<video>", "x", data=[{"type": "video", "video_list": ["v.mp4"]}, {"type": "text"}]),
    {
        "messages": [
            {"role": "user", "content": [{"type": "video", "video": "v.mp4", "video_start": 1}, "hi"]},
            {"role": "assistant", "content": "v.mp4"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "video"}, {"type": "image", "image": "v.mp4"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
        ],
        "video": "w.mp4",
    },
]


@pytest.mark.parametrize("record", DIALECTS)
def test_videos_of_a_line_are_replaced(record):
    def read(raw):
        return read_sample(raw, root="/m", file="f", line=1)

    raw = json.dumps(record).encode()
    names = {"/m/v.mp4": "/out/v.mp4", "/m/w.mp4": "/out/ü.mp4"}
    before, after = read(raw), read(replace_videos(raw, "/m", names))
    assert [v.path for v in after.videos] == [names[v.path] for v in before.videos]
    assert [(v.start, v.end) for v in after.videos] == [(v.start, v.end) for v in before.videos]
    assert (after.turns, after.images) == (before.turns, before.images)
    assert replace_videos(raw, "/m", {"/m/z.mp4": "/out/z.mp4"}) == raw


def test_an_archive(tmp_path, tokenizer_dir):
    """Copies, failures, annotations that preprocessing reads, and a second run that does nothing."""
    (tmp_path / "clips").mkdir()
    make_video(tmp_path / "clips" / "a.mp4", 30)
    make_video(tmp_path / "clips" / "b.avi", 20, codec="mpeg4")
    (tmp_path / "clips" / "bad.mp4").write_bytes((tmp_path / "clips" / "a.mp4").read_bytes()[:900])
    make_image(tmp_path / "p.png", (30, 30))
    records = [
        conversation("<video> <image>", "x", video="clips/a.mp4", image="p.png"),
        conversation("<video>", "y", video={"video": "clips/b.avi", "start": 0.5}),
        conversation("<video>", "z", video="clips/bad.mp4"),
        "{broken",
        conversation("Hi", "Ho"),
    ]
    write_jsonl(tmp_path / "data.jsonl", records)
    recipe = {"clips": {"annotation": "data.jsonl", "repeat_time": 1, "fps": 4}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    arguments = ("preprocess_data", "transcode", tmp_path / "recipe.json", "--output", tmp_path / "out")
    options = ("--size", 64, "--gop", 4, "--workers", 1)
    done = call_tool(*arguments, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 copies, 2 of them new: ")
    (failure,) = map(json.loads, (tmp_path / "out" / "failed.jsonl").open())
    assert (failure["source"], failure["kind"]) == (str(tmp_path / "clips" / "bad.mp4"), "truncated video")
    copy = tmp_path / "out" / "videos" / tmp_path.relative_to("/") / "clips" / "b.avi.mp4"
    assert times(copy) == times(tmp_path / "clips" / "b.avi")
    lines = (tmp_path / "out" / "clips.jsonl").read_text().splitlines()
    assert lines[2:] == (tmp_path / "data.jsonl").read_text().splitlines()[2:]

    stores = []
    for name in ("recipe.json", "out/recipe.json"):
        settings = PreprocessSettings(str(tokenizer_dir), (3000,))
        preprocess(tmp_path / name, tmp_path / f"store{len(stores)}", settings, Execution(1))
        stores.append(SampleStore(tmp_path / f"store{len(stores)}"))
    assert [len(store) for store in stores] == [3, 3]
    for row in range(3):
        old, new = (store[row] for store in stores)
        assert old.ids.tolist() == new.ids.tolist()
        assert [v.times for v in old.videos] == [v.times for v in new.videos]
    assert stores[1][1].videos[0].path == str(copy)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "videos").rglob("*.mp4")}
    again = call_tool(*arguments, *options)
    assert again.stdout.startswith("2 copies, 0 of them new: ")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    copy.write_bytes(b"")  # damaged, or the source changed, or other settings: made again
    os.utime(tmp_path / "clips" / "a.mp4", ns=(0, 0))
    assert call_tool(*arguments, *options).stdout.startswith("2 copies, 2 of them new: ")
    assert call_tool(*arguments, *options[:3], 8, *options[4:]).stdout.startswith("2 copies, 2 of them new: ")


def test_a_folder_in_several_processes_killed_on_the_way(tmp_path):
    for k in range(6):
        (tmp_path / "in" / f"{k % 2}").mkdir(parents=True, exist_ok=True)
        make_video(tmp_path / "in" / f"{k % 2}" / f"{k}.mkv", 20 + k)
    (tmp_path / "in" / "notes.txt").touch()
    program = (
        "import os, sys; from megatron_eagle.data.preparation import transcode as t\n"
        "real = t.transcode_video\n"
        "def some(source, *rest):\n"
        "    os._exit(9) if source.endswith('3.mkv') else None\n"
        "    return real(source, *rest)\n"
        "t.transcode_video = some\n"
        "t.transcode(sys.argv[1], sys.argv[2], t.TranscodeSettings(size=64, gop=4), 1)\n"
    )
    command = [sys.executable, "-c", program, tmp_path / "in", tmp_path / "out"]
    assert subprocess.run(command, cwd=REPO, capture_output=True).returncode == 9
    log = tmp_path / "out" / "transcoded.jsonl"
    n_done = len(log.read_text().splitlines())
    assert 0 < n_done < 6
    with log.open("a") as file:
        file.write('{"source": "cut off')
    made = transcode(tmp_path / "in", tmp_path / "out", SMALL, workers=2)
    assert (len(made.copies), made.n_new, made.failures) == (6, 6 - n_done, [])
    assert len(log.read_text().splitlines()) == 6
    for k in range(6):
        copy = tmp_path / "out" / "videos" / f"{k % 2}" / f"{k}.mkv.mp4"
        assert numbers(copy, [0, 19 + k]) == [0, 19 + k]
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_what_a_user_can_get_wrong(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="names no video"):
        transcode(tmp_path, tmp_path / "out", SMALL)
    for wrong in ({"size": 63}, {"gop": 0}, {"codec": "mp3"}, {"crf": 99}, {"audio": "loud"}):
        (name,) = wrong
        with pytest.raises(UserError, match=f"--{name} must be"):
            TranscodeSettings(**wrong)
    make_video(tmp_path / "a.avi", 5, codec="mpeg4")
    make_video(tmp_path / "a.avi.mp4", 5)
    with pytest.raises(UserError, match="would have one name; rename one"):
        transcode(tmp_path, tmp_path / "out", SMALL)
    (tmp_path / "a.avi").unlink()
    with pytest.raises(UserError, match="--workers must be at least 1, got 0"):
        transcode(tmp_path, tmp_path / "out", SMALL, workers=0)
    (tmp_path / "out").mkdir()
    with lock_file(tmp_path / "out" / ".lock"), pytest.raises(UserError, match="another process is working"):
        transcode(tmp_path, tmp_path / "out", SMALL)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(one, "_encode", full)
    with pytest.raises(UserError, match="cannot write .*out: No space left on device; when that is mended"):
        transcode(tmp_path, tmp_path / "out", SMALL, workers=1)
