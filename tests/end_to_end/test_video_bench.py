"""The benchmark of video readers: its clips number their frames, its readers are judged by them."""

import importlib

import av
import pytest

from tests.paths import REPO


@pytest.fixture
def video(monkeypatch):
    monkeypatch.syspath_prepend(REPO / "tools")
    return importlib.import_module("benchmarks.video")


def test_clips_number_their_frames(video, tmp_path):
    clip = video.Clip("two seconds, twice", 2 / 60, 10, repeats=2)
    path = video.make_clip(tmp_path, clip)
    read_number = importlib.import_module("benchmarks.video_clips").read_number
    with av.open(str(path)) as container:
        shown = [read_number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert shown == 2 * list(range(50))
    written = path.stat().st_mtime_ns
    assert video.make_clip(tmp_path, clip).stat().st_mtime_ns == written


def test_right_frames_are_counted(video, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "_REPEATS", 1)
    clip = video.Clip("two seconds", 2 / 60, 10)
    path = video.make_clip(tmp_path, clip)
    exact, linear = video.compare(clip, path, path, 8, ["ours", "PyAV, sequential"])
    assert (exact["right"], linear["right"], exact["x ours"]) == (8, 8, 1)
    assert exact["peak MB"] < 150
    monkeypatch.setattr(video, "wanted_frames", lambda clip, count: [3, 99])
    (failed,) = video.compare(clip, path, path, 2, ["ours"])
    assert failed["right"] == "failed"
    readers = importlib.import_module("benchmarks.video_readers").READERS
    late = (lambda path, numbers: readers["ours"][0](path, [number + 1 for number in numbers]), "av")
    monkeypatch.setitem(readers, "off by one", late)
    monkeypatch.setattr(video, "wanted_frames", lambda clip, count: [3, 40])
    assert [row["right"] for row in video.compare(clip, path, path, 2, ["ours", "off by one"])] == [2, 0]
