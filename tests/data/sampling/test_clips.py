"""Clips end with their file; where the frame rate varies, frames are chosen by time."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_eagle.data.annotations.formats import read_sample
from megatron_eagle.data.sample import VideoSource
from megatron_eagle.data.sampling.ads import SamplingSettings
from megatron_eagle.data.sampling.probe import probe_video
from megatron_eagle.hf_model.clips import choose_frames, spread, uneven_times
from megatron_eagle.hf_model.media_files import load_video
from megatron_eagle.problems import Problem
from tests.data.helpers import conversation, make_image, make_video

SLIDES = [0, 5000, 10000, *range(10040, 12000, 40)]  # ms: two slides, then 25 frames a second


def test_a_clip_beyond_its_file(tmp_path):
    path = str(make_video(tmp_path / "a.mp4", 100, fps=25))
    for start, end, duration in ((3, 99, 1), (None, 99, 4), (Fraction(1, 2), Fraction(3, 2), 1)):
        start, end = (None if t is None else Fraction(t) for t in (start, end))
        found = probe_video(VideoSource(path, start, end))
        assert found.duration == duration
        shown = load_video(path, video_start=start, video_end=end)
        assert shown.fps == len(shown) / duration
    with pytest.raises(Problem, match="empty clip"):
        probe_video(VideoSource(path, Fraction(4), Fraction(99)))


def test_mistakes_are_named(tmp_path):
    def read(**more):
        record = conversation("<video>", "x", **more)
        return read_sample(json.dumps(record).encode(), root=str(tmp_path), file="f", line=1)

    with pytest.raises(Problem, match="bad clip: start_time must be seconds from 0 on, not -1"):
        read(video={"video": "a.mp4", "start": -1, "end": 2})
    with pytest.raises(Problem, match=r"max_tiles must be a positive whole number, not 1\.0"):
        read(video="a.mp4", max_tiles=1.0)
    for name in ("a.jpg", "a.png"):
        path = make_image(tmp_path / name, (64, 32))
        with pytest.raises(Problem, match=f"unreadable video: .*{name} is a picture; name it as an image"):
            probe_video(VideoSource(str(path)))


def test_a_constant_rate_is_the_rule_of_the_paper():
    """Also where a container has rounded the times, or a frame comes early or late."""
    rng = np.random.default_rng(0)
    frames = np.arange(500)
    for times in (
        frames,
        np.rint(frames * 1000 / 29.97),
        frames * 1000 + rng.integers(-200, 200, 500),
        np.delete(frames, 7),
    ):
        assert uneven_times(times.astype(np.int64).tolist()) is None
    assert choose_frames(3, 502, 17, None) == spread(3, 502, 17)
    assert uneven_times([7]) is uneven_times([7, 9]) is None


def test_a_variable_rate_is_sampled_by_time(tmp_path):
    path = str(make_video(tmp_path / "slides.mkv", len(SLIDES), pts=SLIDES))
    video = probe_video(VideoSource(path))
    chosen = video.demand(SamplingSettings()).frames(5)
    times = video.table.pts[list(chosen)]
    assert chosen[:3] == (0, 1, 2) and chosen[-1] == len(SLIDES) - 1  # by number the slides would be one
    assert np.abs(times[1] - 5000) < 1000
    assert [round(t * 1000) for t in load_video(path, nframes=6).timestamps] == [
        SLIDES[i] for i in video.demand(SamplingSettings()).frames(6)
    ]


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=40), st.data())
def test_frames_by_time_are_distinct_and_near(gaps, data):
    times = np.cumsum([0, *gaps])
    n = data.draw(st.integers(2, len(times)))
    chosen = choose_frames(10, 10 + len(times) - 1, n, times)
    assert len(set(chosen)) == n and list(chosen) == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (10, 10 + len(times) - 1)
    wanted = np.linspace(times[0], times[-1], n)
    nearest = [int(np.abs(times - t).argmin()) for t in wanted]
    if len(set(nearest)) == n:  # no two want the same one
        found = np.array(chosen) - 10
        assert np.allclose(np.abs(times[found] - wanted), np.abs(times[nearest] - wanted))
