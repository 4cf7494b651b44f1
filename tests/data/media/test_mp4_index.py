"""Frame tables of MP4 files from their boxes alone are those from reading all packets."""

import struct
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_eagle.data.media import frame_index
from megatron_eagle.data.media.frame_index import read_frame_table
from megatron_eagle.data.media.mp4_index import read_mp4
from megatron_eagle.data.media.source import FileMetadata
from megatron_eagle.problems import Problem
from tests.data.helpers import make_video
from tests.data.media.mp4_edit import (
    SAMPLES,
    TRACK,
    compact_sizes,
    edit_list,
    long_box,
    long_headers,
    long_places,
    rename,
    rewrite,
    rotate,
    shift_offsets,
)
from tests.paths import MEDIA, need_media

VFR = [0, 30, 200, 210, 700, 720, 1500, 1501, 1600, 3000, 3100, 3200, 4000, 4500, 5000, 5100, 5200, 6000]
OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3:b-pyramid=normal:scenecut=0"}
OPEN_GOP_HEVC = {"x265-params": "log-level=none:open-gop=1:keyint=12:bframes=3"}
CLIPS = {
    "b_frames": {},
    "open_gop": {"options": OPEN_GOP},
    "open_gop_hevc": {"codec": "libx265", "options": OPEN_GOP_HEVC},
    "variable": {"pts": VFR, "n_frames": len(VFR)},
    "no_b_frames": {"options": {"bf": "0"}},
    "faststart": {"movflags": "faststart"},
    "sound_first": {"sound_first": True},
    "hevc": {"codec": "libx265", "options": {"x265-params": "log-level=none:open-gop=0:bframes=2"}},
    "vp9": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "av1": {"codec": "libsvtav1", "options": {"preset": "12"}},
    "open_gop_mpeg4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "all_key": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "one_frame": {"n_frames": 1},
}


@cache
def clip(name):
    with TemporaryDirectory() as folder:
        options = {"n_frames": 40, "fps": 25, **CLIPS[name]}
        return make_video(Path(folder) / "clip.mp4", **options).read_bytes()


def both(path):
    """The table from the boxes (None: left to FFmpeg) and the one from the packets."""
    file = FileMetadata(str(path), path.stat().st_size, 0)
    boxes = read_mp4(str(path), file.size)
    return boxes and boxes.table(file, 0), frame_index.demux(str(path)).table(file, 0)


def assert_same(ours, theirs):
    for field in fields(ours):
        ours_value, theirs_value = getattr(ours, field.name), getattr(theirs, field.name)
        np.testing.assert_array_equal(ours_value, theirs_value, err_msg=field.name)


@pytest.mark.parametrize("name", CLIPS)
def test_every_encoder_and_layout(tmp_path, name):
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip(name))
    ours, theirs = both(path)
    assert_same(ours, theirs)
    assert len(ours.pts) == CLIPS[name].get("n_frames", 40)
    assert ours.stream == (1 if name == "sound_first" else 0)
    assert ours.open_gop == name.startswith("open_gop")


CHANGES = {
    "turned 90": lambda data: rotate(data, 90),
    "turned 180": lambda data: rotate(data, 180),
    "turned 270": lambda data: rotate(data, 270),
    "64-bit headers": long_headers,
    "64-bit places": long_places,
    "64-bit box": long_box,
    "16-bit sizes": compact_sizes,
    "negative start": lambda data: shift_offsets(data, -3000),
    "negative start without an edit": lambda data: rename(
        shift_offsets(data, -3000), [*TRACK, b"edts"], b"free", lambda old: old
    ),
    "no edit list": lambda data: rename(data, [*TRACK, b"edts"], b"free", lambda old: old),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_form_of_box(tmp_path, change):
    path = tmp_path / "clip.mp4"
    path.write_bytes(CHANGES[change](clip("b_frames")))
    ours, theirs = both(path)
    assert_same(ours, theirs)
    assert ours.rotation % 360 == int(change.split()[1]) if change.startswith("turned") else not ours.rotation
    assert (ours.pts[0] < 0) == change.startswith("negative")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([name for name in CLIPS if name not in ("faststart", "sound_first")]),
    begin=st.integers(0, 22_000),
    span=st.integers(1, 2500),
    empty=st.none() | st.integers(0, 3000),
    version=st.sampled_from([0, 1]),
    shift=st.sampled_from([0, 0, 1000, -100, -512, -5000]),
)
def test_every_edit_list(tmp_path, name, begin, span, empty, version, shift):
    data = edit_list(clip(name), [(empty, -1)] * (empty is not None) + [(span, begin)], version)
    if shift and b"ctts" in data:
        data = shift_offsets(data, shift)
    path = tmp_path / "edited.mp4"
    path.write_bytes(data)
    assume(read_mp4(str(path), len(data)) is not None)
    assert_same(*both(path))


def test_hidden_frames_are_known(tmp_path):
    """An edit of frames 17 to 24 of a clip with a key frame every 12: decoding begins at 12, unseen."""
    path = tmp_path / "cut.mp4"
    timescale = 25 * 512
    path.write_bytes(edit_list(clip("no_b_frames"), [(320, 17 * timescale // 25)]))
    ours, theirs = both(path)
    assert_same(ours, theirs)
    assert (ours.pts * 25 / timescale).tolist() == list(range(8))
    assert (ours.keyframes * 25 / timescale).tolist() == [-5, 7]


def set_count(kind, count, at=4):
    """A table that promises `count` entries."""
    return lambda data: rewrite(
        data, [*SAMPLES, kind], lambda old: old[:at] + struct.pack(">I", count) + old[at + 4 :]
    )


def promise_samples(data):
    """Four billion frames of one byte each, in tables of a few bytes."""
    many = struct.pack(">I", 4_000_000_000)
    data = rewrite(data, [*SAMPLES, b"stsz"], lambda old: bytes(4) + struct.pack(">I", 1) + many)
    return rewrite(data, [*SAMPLES, b"stts"], lambda old: bytes(4) + struct.pack(">I", 1) + many + old[12:16])


HOSTILE = {
    "a billion times": (set_count(b"stts", 1_000_000_000), "unreadable video: .* stts promises 1000000000"),
    "a billion offsets": (set_count(b"ctts", 1_000_000_000), "unreadable video: .* ctts promises"),
    "a billion keys": (set_count(b"stss", 1_000_000_000), "unreadable video: .* stss promises"),
    "a billion sizes": (set_count(b"stsz", 1_000_000_000, 8), "unreadable video: .* 1000000000 frames"),
    "billions of frames": (promise_samples, "unreadable video: .* 4000000000 frames are promised"),
    "a box beyond the file": (
        lambda data: data.replace(struct.pack(">I4s", 8, b"free"), struct.pack(">I4s", 1 << 31, b"free")),
        "truncated video: .* has [0-9]* of 21[0-9]* bytes",
    ),
    "frames beyond the file": (
        lambda data: rewrite(data, [*SAMPLES, b"stco"], lambda old: old[:8] + b"\x7f" + old[9:]),
        "truncated video",
    ),
    "no moov": (lambda data: data[: data.rindex(b"moov") - 4], "unreadable video: .* no moov box"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_promises_that_cannot_be_kept_are_one_clear_line(tmp_path, name):
    change, message = HOSTILE[name]
    path = tmp_path / "bad.mp4"
    path.write_bytes(change(clip("b_frames")))
    with pytest.raises(Problem, match=message):
        read_frame_table(str(path))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["b_frames", "hevc", "sound_first"]), seed=st.integers(0, 1 << 30))
def test_whatever_the_boxes_hold(tmp_path, name, seed):
    """Bytes of `moov` at random: a table, a problem, or left to FFmpeg; nothing else."""
    data = bytearray(clip(name))
    generator = np.random.default_rng(seed)
    for place in generator.integers(data.rindex(b"moov"), len(data), generator.integers(1, 6)):
        data[place] = generator.choice([0, 1, 0x7F, 0xFF, generator.integers(256)])
    path = tmp_path / "random.mp4"
    path.write_bytes(data)
    with suppress(Problem):
        coded = read_mp4(str(path), len(data))
        assert coded is None or len(coded.table(FileMetadata(str(path), len(data), 0), 0).pts) > 0


NOT_PLAIN = {
    "two edits": lambda data: edit_list(data, [(300, 0), (300, 9000)]),
    "slow motion": lambda data: edit_list(data, [(300, 0)]).replace(
        struct.pack(">IiI", 300, 0, 0x10000), struct.pack(">IiI", 300, 0, 0x8000)
    ),
    "partial key frames": lambda data: rename(data, [*SAMPLES, b"stss"], b"stps", lambda old: old),
    "two descriptions": lambda data: rewrite(
        data, [*SAMPLES, b"stsd"], lambda old: old[:4] + struct.pack(">I", 2) + old[8:] + old[8:]
    ),
    "unknown track": lambda data: rewrite(
        data, [*TRACK, b"mdia", b"hdlr"], lambda old: old[:8] + b"data" + old[12:]
    ),
    "turned movie": lambda data: rewrite(
        data, [b"moov", b"mvhd"], lambda old: old[:36] + bytes(36) + old[72:]
    ),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_not_plain_is_left_to_ffmpeg(tmp_path, name):
    path = tmp_path / "odd.mp4"
    data = NOT_PLAIN[name](clip("b_frames"))
    assert data != clip("b_frames")
    path.write_bytes(data)
    assert read_mp4(str(path), len(data)) is None


def test_fragments_and_other_containers_are_left_to_ffmpeg(tmp_path):
    for name in ("fragments.mp4", "clip.mkv", "clip.avi", "clip.ts"):
        flags = "frag_keyframe+empty_moov" if name == "fragments.mp4" else ""
        codec = "mpeg4" if name == "clip.avi" else "libx264"
        path = make_video(tmp_path / name, 30, movflags=flags, codec=codec)
        assert read_mp4(str(path), path.stat().st_size) is None
        assert len(read_frame_table(str(path)).pts) == 30


@need_media
def test_real_files():
    found = 0
    for path in sorted((MEDIA / "video").glob("*.m[po][4v]")):
        ours, theirs = both(path)
        assert_same(ours, theirs)
        found += 1
    assert found >= 10
