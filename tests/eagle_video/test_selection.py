"""Selection: exact against brute force, bounded, resumable, deterministic; the report is safe to open."""

import json
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_eagle.config import from_dict
from megatron_eagle.data.sample import VideoSource
from megatron_eagle.eagle_video import selection
from megatron_eagle.eagle_video.encoder import Encoder
from megatron_eagle.eagle_video.features import FeatureSettings, WorkShare, build_features, split_clips
from megatron_eagle.eagle_video.files import read_videos
from megatron_eagle.eagle_video.frames import frames_at, open_section, sample_times
from megatron_eagle.eagle_video.search import Blocks, greedy_distinct, highest_cosine
from megatron_eagle.eagle_video.selection import SelectionSettings, read_kept, select, work_on_part
from megatron_eagle.eagle_video.selection_report import write_selection_report
from megatron_eagle.errors import UserError
from megatron_eagle.files import to_line
from tests.data.helpers import conversation, frame_number, make_video, write_jsonl
from tests.eagle_video.helpers import call_tool, make_clip, make_encoder


def _unit(n: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("blocks", [Blocks(7, 5), Blocks(1, 1), Blocks(1000, 1000)])
def test_search_is_exact_whatever_the_blocks(blocks):
    query, parts = _unit(33), [_unit(20, seed=1), _unit(0, seed=2), _unit(41, seed=3)]
    cosine, nearest = highest_cosine(query, parts, blocks)
    everything = query @ np.concatenate(parts).T
    np.testing.assert_allclose(cosine, everything.max(axis=1), atol=1e-6)
    np.testing.assert_array_equal(nearest, everything.argmax(axis=1))


def test_search_without_existing_rows_and_with_equal_ones():
    cosine, nearest = highest_cosine(_unit(3), [])
    assert (cosine == -2).all() and (nearest == -1).all()
    row = _unit(1)
    assert highest_cosine(row, [row.repeat(9, axis=0), row.repeat(3, axis=0)], Blocks(3, 3))[1] == [0]


class _Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_memory_is_bounded_by_the_blocks(tmp_path):
    np.save(tmp_path / "old.npy", _unit(900))
    old = np.load(tmp_path / "old.npy", mmap_mode="r")
    with _Largest() as largest:
        highest_cosine(_unit(500, seed=1), [old], Blocks(64, 128))
    assert largest.elements == 64 * 128
    assert Blocks(64, 128).memory(24) == 4 * (64 * 24 + 128 * 24 + 64 * 128)


def test_greedy_distinct_matches_the_plain_loop():
    shards = [_unit(40, 4), _unit(0, 4), _unit(25, 4, seed=1)]
    wanted = [np.arange(40) % 3 > 0, np.zeros(0, bool), np.ones(25, bool)]
    rows, considered = np.concatenate(shards), np.concatenate(wanted)
    expected: list[int] = []
    for i in np.flatnonzero(considered):
        if all(rows[i] @ rows[j] < 0.8 for j in expected):
            expected.append(i)
    taken = np.concatenate(greedy_distinct(shards, wanted, 0.8, Blocks(6, 6)))
    assert np.flatnonzero(taken).tolist() == expected
    assert len(expected) < considered.sum()


def test_frames_are_those_on_screen(tmp_path):
    facts, start = open_section(VideoSource(str(make_video(tmp_path / "a.mp4", 30, fps=10))))
    times = sample_times(start, start + 3, 1)
    assert times == [Fraction(1, 2), Fraction(3, 2), Fraction(5, 2)]
    assert [frame_number(f) for f in frames_at(facts, times)] == [5, 15, 25]
    close = [Fraction(1), Fraction(101, 100), Fraction(2)]
    assert [frame_number(f) for f in frames_at(facts, close)] == [10, 10, 20]
    assert len(sample_times(Fraction(0), Fraction(300), 2, 50)) == 50
    assert sample_times(Fraction(0), Fraction(1, 10), 1) == [Fraction(1, 20)]


def test_clips_cover_a_video_once():
    settings = FeatureSettings()
    assert split_clips(Fraction(0), Fraction(24), settings) == [(0, 10), (10, 24)]
    assert split_clips(Fraction(0), Fraction(25), settings) == [(0, 10), (10, 20), (20, 25)]
    assert split_clips(Fraction(5), Fraction(6), settings) == [(5, 6)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Existing: scenes 1, 2.  Candidates: scene 3, scene 1 again, scene 3 again, scene 4."""
    folder = tmp_path_factory.mktemp("videos")
    make_encoder(folder / "encoder")
    make_clip(folder / "old.mp4", [1, 2])
    make_clip(folder / "new<b>.mp4", [3, 1])
    make_clip(folder / "more.mp4", [3, 4])
    (folder / "broken.mp4").write_bytes(b"no video")
    write_jsonl(folder / "old.jsonl", [conversation("<video> What?", "That.", video="old.mp4"), "{"])
    (folder / "new.txt").write_text("new<b>.mp4\nbroken.mp4\n\nmore.mp4\nmissing.mp4\n")
    return folder


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_features_are_means_of_frame_features(family, videos, tmp_path):
    encoder = Encoder(make_encoder(tmp_path / "encoder", family), "cpu")
    (shard,) = build_features([VideoSource(str(videos / "old.mp4"))], tmp_path / "f", encoder)
    assert shard.features.shape == (2, encoder.dim) and isinstance(shard.features, np.memmap)
    np.testing.assert_allclose(np.linalg.norm(shard.features, axis=1), 1, atol=1e-5)
    facts, start = open_section(VideoSource(str(videos / "old.mp4")))
    frames = frames_at(facts, sample_times(start, start + 10, 1))
    rows = encoder.encode(torch.stack([encoder.prepare(frame) for frame in frames])).mean(dim=0)
    np.testing.assert_allclose(shard.features[0], rows / rows.norm(), atol=1e-5)


def test_select_keeps_what_is_new_and_resumes(videos, tmp_path, monkeypatch):
    settings = SelectionSettings(tau=0.99, distinct=0.99, clips=FeatureSettings(videos_per_shard=2))
    candidates, _ = read_videos(videos / "new.txt")
    existing, dropped = read_videos(videos / "old.jsonl")
    assert [entry.kind for entry in dropped] == ["broken JSON"]
    encoder = Encoder(videos / "encoder", "cpu")
    first = select(candidates, existing, tmp_path, encoder, settings)
    reasons = [d.refused for d in first.decisions]
    assert reasons == [None, "like the training set", "like another candidate", None]
    assert first.decisions[1].nearest == type(first.decisions[1].clip)(str(videos / "old.mp4"), 0.0, 10.0)
    assert {v.rsplit("/", 1)[1]: why.split(":")[0] for v, why in first.problems} == {
        "broken.mp4": "unreadable video",
        "missing.mp4": "missing media",
    }
    written = (tmp_path / "kept.jsonl").read_bytes()
    assert [c.start for c in read_kept(tmp_path / "kept.jsonl")] == [0.0, 10.0]

    (tmp_path / "candidates" / "shard-00001.json").unlink()  # killed before the second shard was finished
    calls = []
    monkeypatch.setattr(encoder, "encode", lambda p, encode=encoder.encode: calls.append(len(p)) or encode(p))
    again = select(candidates, existing, tmp_path, encoder, settings)
    assert calls == [10, 10] and again == first and (tmp_path / "kept.jsonl").read_bytes() == written

    other = SelectionSettings(tau=0.99, clips=FeatureSettings(videos_per_shard=2, fps=2))
    assert len(select(candidates, existing, tmp_path, encoder, other).kept) == 3
    assert calls[2:] == [20] * 6  # other settings: all six clips again


def test_a_kept_video_s_name_may_hold_another_line_end(tmp_path):
    record = {"video": "a\u2028b.mp4", "start": 0.0, "end": 1.0}
    (tmp_path / "kept.jsonl").write_bytes(to_line(record))
    assert [clip.video for clip in read_kept(tmp_path / "kept.jsonl")] == [record["video"]]


def test_machines_share_the_work(videos, tmp_path, monkeypatch):
    settings = SelectionSettings(tau=0.99, distinct=0.99, clips=FeatureSettings(videos_per_shard=1))
    candidates, _ = read_videos(videos / "new.txt")
    existing = [VideoSource(str(videos / "old.mp4"), end=Fraction(10 * i)) for i in (1, 2)]
    encoder = Encoder(videos / "encoder", "cpu")
    alone = select(candidates, existing, tmp_path / "alone", encoder, settings)
    folder = tmp_path / "shared"
    work = partial(work_on_part, candidates, existing, folder, encoder, settings)
    first, second = partial(work, WorkShare(0, 2)), partial(work, WorkShare(1, 2))
    assert not first()  # the other half of the existing set is not there yet
    names = sorted(path.name for path in (folder / "candidates").glob("*.npy"))
    assert names == ["shard-00000.npy", "shard-00002.npy"]
    assert second() and first()
    calls = []
    monkeypatch.setattr(encoder, "encode", lambda p: calls.append(p))
    monkeypatch.setattr(selection, "highest_cosine", lambda *a: calls.append(a))
    joined = select(candidates, existing, folder, encoder, settings)
    assert joined == alone and not calls  # nothing was left to compute
    with pytest.raises(ValueError, match="a part is K/N"):
        WorkShare(2, 2)


def test_a_shard_without_clips(videos, tmp_path):
    sources = [VideoSource(str(videos / name)) for name in ("broken.mp4", "old.mp4")]
    settings = SelectionSettings(distinct=0.9, clips=FeatureSettings(videos_per_shard=1))
    selection = select(sources, sources, tmp_path, Encoder(videos / "encoder", "cpu"), settings)
    assert [d.refused for d in selection.decisions] == ["like the training set"] * 2
    assert [d.nearest for d in selection.decisions] == [d.clip for d in selection.decisions]
    assert len(selection.problems) == 2


def test_tool_writes_a_safe_report(videos, tmp_path):
    arguments = ["--candidates", videos / "new.txt", "--existing", videos / "old.jsonl"]
    arguments += ["--encoder", videos / "encoder", "--output", tmp_path, "--tau", "0.99", "--device", "cpu"]
    done = call_tool("select_videos", *arguments)
    assert done.returncode == 0, done.stderr
    assert "4 candidate clips against 2" in done.stdout and "unreadable lines        1" in done.stdout
    report = (tmp_path / "report.html").read_text()
    assert "new&lt;b&gt;.mp4" in report and "<b>" not in report and "http" not in report
    assert report.count("data:image/jpeg") == 8 and "<svg" in report
    assert len([json.loads(line) for line in (tmp_path / "refused.jsonl").open()]) == 1


def test_mistakes_are_one_line(videos, tmp_path):
    with pytest.raises(UserError, match="no-such"):
        read_videos(tmp_path / "no-such.txt")
    with pytest.raises(UserError, match="give a local CLIP or SigLIP folder"):
        Encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="'bert'"):
        Encoder(tmp_path)
    with pytest.raises(UserError, match="tau must be a cosine"):
        from_dict(SelectionSettings, {"tau": 2})


def test_report_without_anything_to_compare(tmp_path, videos):
    encoder = Encoder(videos / "encoder", "cpu")
    selection = select([VideoSource(str(videos / "old.mp4"))], [], tmp_path, encoder)
    assert len(selection.kept) == 2
    write_selection_report(tmp_path / "r.html", selection, SelectionSettings())
    assert "no clips to compare with" in (tmp_path / "r.html").read_text()
