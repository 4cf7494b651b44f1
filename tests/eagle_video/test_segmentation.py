"""Videos without chapters: parts where the picture changes, against plain loops and drawn scenes."""

import json

import numpy as np
import pytest

from megatron_eagle.eagle_video.encoder import Encoder
from megatron_eagle.eagle_video.records import Notes
from megatron_eagle.eagle_video.segmentation import (
    SegmentSettings,
    boundaries,
    change_scores,
    detect_all,
    detect_chapters,
)
from tests.eagle_video.helpers import call_tool, make_clip, make_encoder
from tests.eagle_video.server import serving


def test_scores_are_those_of_the_plain_loop():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(23, 5)).astype(np.float32)
    scores = change_scores(features, 4)
    assert scores[0] == 0
    for i in range(1, 23):
        before, after = features[max(0, i - 4) : i].mean(0), features[i : i + 4].mean(0)
        cosine = before @ after / np.linalg.norm(before) / np.linalg.norm(after)
        assert scores[i] == pytest.approx(1 - cosine, abs=1e-5)


def test_parts_are_neither_too_short_nor_too_long():
    rng = np.random.default_rng(1)
    settings = SegmentSettings(shortest=5, longest=20, window=2, change=0.05)
    for n in (1, 3, 9, 10, 57, 200):
        features = np.repeat(rng.normal(size=(n, 8)), rng.integers(1, 9), axis=0)[:n].astype(np.float32)
        cuts = boundaries(features, 1.0, settings)
        parts = np.diff([0, *cuts, n])
        assert parts.sum() == n and (parts.max() <= 20) and (n < 10 or parts.min() >= 5)


@pytest.mark.parametrize("encoder", [False, True])
def test_scenes_are_found(encoder, tmp_path):
    model = Encoder(make_encoder(tmp_path / "encoder"), "cpu") if encoder else None
    video = make_clip(tmp_path / "v.mp4", [1, 1, 2, 3, 3, 3], seconds=12)
    settings = SegmentSettings(shortest=6, change=0.01)
    chapters = detect_chapters(str(video), settings, model)
    assert [(c.start, c.end) for c in chapters] == [(0, 24), (24, 36), (36, 72)]
    assert [c.title for c in chapters] == ["Part 1 of 3", "Part 2 of 3", "Part 3 of 3"]
    still = make_clip(tmp_path / "still.mp4", [4, 4], seconds=12)
    assert [(c.start, c.end) for c in detect_chapters(str(still), settings, model)] == [(0, 24)]


def test_what_cannot_be_read_is_noted(tmp_path):
    make_clip(tmp_path / "good.mp4", [1])
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "text.txt").write_text("no video either")
    notes = Notes("videos")
    assert [video.id for video in detect_all(tmp_path, notes, SegmentSettings())] == ["good"]
    assert notes.write(tmp_path / "dropped.jsonl") == {"unreadable video": 1}


def test_story_without_a_chapter_file(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "videos").mkdir()
    make_clip(tmp_path / "videos" / "v.mp4", [1, 2], seconds=12)
    titles = []

    def reply(request):
        text = json.dumps(request["messages"])
        titles.extend(title for title in ("Part 1 of 2", "Part 2 of 2") if title in text)
        if "image_url" in text:
            return '{"caption": "A pattern."}'
        return '{"qa": [{"question": "What?", "answer": "A pattern."}]}'

    with serving(reply) as server:
        arguments = ["story", "--videos", tmp_path / "videos", "--endpoint", server.url, "--model", "m"]
        arguments += ["--output", tmp_path / "o.jsonl", "--max-frames", 2]
        done = call_tool("annotate_videos", *arguments)
        assert done.returncode == 0, done.stderr
        wrong = call_tool("annotate_videos", *arguments, "--longest-part", 5)
    assert wrong.returncode == 2 and "longest must be at least twice shortest" in wrong.stderr
    line = json.loads((tmp_path / "o.jsonl").read_text())
    assert titles[:2] == ["Part 1 of 2", "Part 2 of 2"] and "Part 2 of 2" in json.dumps(line)
