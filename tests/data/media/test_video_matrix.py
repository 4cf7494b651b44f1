"""Everything that is odd or wrong with a video file, and what becomes of it: the right frames, or one line.

Every frame shows its own number, so that a wrong one cannot look right.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from megatron_eagle.data.media.exact import read_frames
from megatron_eagle.data.media.frame_index import open_video, read_frame_table
from megatron_eagle.data.media.video import decode_frames
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.hf_model.tiles import resize
from megatron_eagle.problems import Problem
from tests.data.helpers import conversation, frame_number, make_store, make_video
from tests.data.media.mp4_edit import TRACK, edit_list, rename, rotate, shift_offsets
from tests.paths import MEDIA, need_media

N = 48  # frames of a clip, a key frame every 12
TILE = 64
ALL = range(N)
UNIT = 1024  # of time between frames in an MP4 file of 10 frames a second
VFR = np.cumsum(np.random.default_rng(0).integers(1, 400, N)).tolist()
OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3:b-pyramid=normal:scenecut=0"}
OPEN_GOP_HEVC = {"x265-params": "log-level=none:open-gop=1:keyint=12:bframes=3:scenecut=0"}


def two_videos(path):
    """Two video streams, of which the first counts."""
    sources = [make_video(path.with_name(f"{n}.mp4"), n) for n in (N, 5)]
    with av.open(str(path), "w") as target, av.open(str(sources[0])) as a, av.open(str(sources[1])) as b:
        copies = [(source, target.add_stream_from_template(source.streams.video[0])) for source in (a, b)]
        for source, copy in copies:
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = copy
                    target.mux(packet)


def begins_inside(path):
    """Cut out of a clip with open GOPs: what is shown before its first key frame refers to what is lost."""
    source = make_video(path.with_name("source.mp4"), N, options=OPEN_GOP)
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        copy = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.dts is not None]
        second_key = [i for i, packet in enumerate(packets) if packet.is_keyframe][1]
        for packet in packets[second_key:]:
            packet.stream = copy
            new.mux(packet)


def misnamed(path):
    """Matroska by another name."""
    make_video(path.with_suffix(".mkv"), N).rename(path)


def without_edits(data):
    return rename(data, [*TRACK, b"edts"], b"free", lambda old: old)


def make(folder, name, options=None, change=None):
    """A clip by the name of its file, `make_video`'s options, and what is then done to its bytes."""
    path = folder / name
    if callable(options):
        options(path)
    else:
        make_video(path, **{"n_frames": N, **(options or {})})
    if change:
        path.write_bytes(change(path.read_bytes()))
    return path


NO_B = {"options": {"bf": "0"}}
# What a file is: its name, how it is made (and changed), the numbers that its frames show.
READABLE = {
    "B-frames": ("a.mp4", {}, None, ALL),
    "moov at the front": ("a.mp4", {"movflags": "faststart"}, None, ALL),
    "fragments": ("a.mp4", {"movflags": "frag_keyframe+empty_moov"}, None, ALL),
    "Matroska": ("a.mkv", {}, None, ALL),
    "AVI": ("a.avi", {"codec": "mpeg4"}, None, ALL),
    "transport stream": ("a.ts", {}, None, ALL),
    "program stream": ("a.mpg", {"codec": "mpeg2video", "fps": 25}, None, ALL),
    "VP9": ("a.webm", {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}}, None, ALL),
    "AV1": ("a.mp4", {"codec": "libsvtav1", "options": {"preset": "12"}}, None, ALL),
    "HEVC": ("a.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}, None, ALL),
    "only key frames": ("a.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}, None, ALL),
    "wrong extension": ("a.mp4", misnamed, None, ALL),
    "sound first": ("a.mp4", {"sound_first": True}, None, ALL),
    "two video streams": ("a.mkv", two_videos, None, ALL),
    "10-bit": ("a.mp4", {"pix_fmt": "yuv420p10le"}, None, ALL),
    "4:4:4": ("a.mp4", {"pix_fmt": "yuv444p"}, None, ALL),
    "4:2:2, 10-bit": ("a.mp4", {"pix_fmt": "yuv422p10le"}, None, ALL),
    "rotation 90": ("a.mp4", {}, lambda data: rotate(data, 90), ALL),
    "rotation 180": ("a.mp4", {}, lambda data: rotate(data, 180), ALL),
    "rotation 270": ("a.mp4", {}, lambda data: rotate(data, 270), ALL),
    "variable frame rate": ("a.mp4", {"pts": VFR}, None, ALL),
    "variable frame rate, Matroska": ("a.mkv", {"pts": VFR}, None, ALL),
    "edit list": ("a.mp4", NO_B, lambda data: edit_list(data, [(2000, 17 * UNIT)]), range(17, 37)),
    "edit list, B-frames": ("a.mp4", {}, lambda data: edit_list(data, [(9000, 19 * UNIT)]), range(17, N)),
    "empty edit": ("a.mp4", NO_B, lambda data: edit_list(data, [(500, -1), (900, 0)]), range(9)),
    "negative start": ("a.mp4", {}, lambda data: without_edits(shift_offsets(data, -9 * UNIT)), ALL),
    "open GOP": ("a.mp4", {"options": OPEN_GOP}, None, ALL),
    "open GOP, HEVC": ("a.mp4", {"codec": "libx265", "options": OPEN_GOP_HEVC}, None, ALL),
    "begins inside an open GOP": ("a.mkv", begins_inside, None, range(12, N)),
    "gradual refresh": (
        "a.mp4",
        {"options": {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}},
        None,
        ALL,
    ),
    "one frame": ("a.mp4", {"n_frames": 1}, None, [0]),
}


def sequential(path, stream):
    """Tiles and times of all frames, decoded one after the other without a seek."""
    with open_video(str(path)) as container:
        frames = list(container.decode(container.streams[stream]))
    pictures = [np.rot90(f.to_ndarray(format="rgb24"), round(f.rotation / 90)) for f in frames]
    tiles = [resize(np.ascontiguousarray(picture), TILE, TILE) for picture in pictures]
    return torch.stack(tiles), [float(frame.pts * frame.time_base) for frame in frames]


def shown_number(tile, rotation):
    return frame_number(np.rot90(tile.permute(1, 2, 0).numpy(), -rotation // 90))


@pytest.mark.parametrize("name", READABLE)
def test_odd_files_are_read_exactly(tmp_path, name):
    *made, expected = READABLE[name]
    path = str(make(tmp_path, *made))
    index = read_frame_table(path).index
    n = index.n_frames
    tiles, times = decode_frames(path, index, range(n), size=TILE)
    assert [shown_number(tile, index.rotation) for tile in tiles] == list(expected)
    reference, reference_times = sequential(path, index.stream)
    assert torch.equal(tiles, reference)
    np.testing.assert_allclose(times, reference_times, rtol=0, atol=1e-9)
    if name.startswith("rotation"):
        assert index.rotation % 360 == int(name.split()[1])
    for wanted in ([n - 1], [n // 2, 0, n // 2, n - 1], list(range(n - 1, -1, -5))):
        some, some_times = decode_frames(path, index, wanted, size=TILE)
        assert torch.equal(some, tiles[wanted])
        assert some_times.tolist() == times[wanted].tolist()
        # A stored plan knows nothing of the frames that it does not show.
        again, _ = decode_frames(path, index.select(wanted), wanted[:1], size=TILE)
        assert torch.equal(again, tiles[wanted[:1]])


def test_why_a_file_is_read_from_its_start(tmp_path):
    reasons = []
    for name in ("transport stream", "gradual refresh", "B-frames"):
        path = str(make(tmp_path, *READABLE[name][:3]))
        list(read_frames(path, read_frame_table(path).index.select([N - 1]), reasons.append))
    assert len(reasons) == 2
    assert reasons[0] == "MPEG transport stream"
    assert reasons[1].startswith("damage at")


def test_a_store_remembers_why(tmp_path, tokenizer_dir):
    names = ["gradual refresh", "transport stream", "B-frames"]
    paths = [make(tmp_path, f"{i}{READABLE[n][0]}", *READABLE[n][1:3]) for i, n in enumerate(names)]
    records = [conversation("<video>", "x", video=path.name) for path in paths]
    store = SampleStore(make_store(tmp_path, tokenizer_dir, records, (4096,)))
    plans = [store[row].videos[0] for row in range(3)]
    assert [plan.linear_reason.split(" ")[0] for plan in plans] == ["damage", "MPEG", ""]
    for plan, path in zip(plans, paths, strict=True):
        index = read_frame_table(str(path)).index
        assert (plan.n_frames, plan.open_gop) == (N, 0)
        tiles, times = decode_frames(plan.path, plan.index, plan.frames[-2:], size=TILE)
        expected, expected_times = decode_frames(str(path), index, plan.frames[-2:], size=TILE)
        assert torch.equal(tiles, expected)
        assert times.tolist() == expected_times.tolist() == plan.times[-2:]


def no_frames(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()


def only_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())


def cut(data):
    return data[: len(data) * 2 // 3]


# What a file is: its name, how it is made and changed, what is said of it when it is indexed.
UNREADABLE = {
    "truncated": ("a.mp4", {}, cut, "truncated video: .* has [0-9]+ of [0-9]+ bytes"),
    "truncated, moov at the front": ("a.mp4", {"movflags": "faststart"}, cut, "truncated video"),
    "truncated fragments": ("a.mp4", {"movflags": "frag_keyframe+empty_moov"}, cut, "truncated video"),
    "truncated Matroska": ("a.mkv", {}, cut, "truncated video"),
    "truncated AVI": ("a.avi", {"codec": "mpeg4"}, cut, "truncated video"),
    "no moov": ("a.mp4", {}, lambda data: data[: data.rindex(b"moov") - 4], "unreadable video: .* no moov"),
    "zero frames": ("a.mp4", no_frames, None, "unreadable video"),
    "zero frames, AVI": ("a.avi", no_frames, None, "unreadable video"),
    "only sound": ("a.mp4", only_sound, None, "unreadable video: .* no video stream"),
    "B-frames without times": ("a.avi", {}, None, "unreadable video: .* AVI does not hold the times"),
    "empty": ("a.mp4", {}, lambda data: b"", "empty file"),
    "text": ("a.mp4", {}, lambda data: b"hello" * 99, "unreadable video"),
    "unknown codec": ("a.mp4", {}, lambda data: data.replace(b"avc1", b"zzz1"), "unreadable video"),
    "all hidden": ("a.mp4", NO_B, lambda data: edit_list(data, [(100, 99 * UNIT)]), "unreadable video"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_bad_files_are_one_clear_line(tmp_path, name):
    *made, message = UNREADABLE[name]
    path = make(tmp_path, *made)
    with pytest.raises(Problem, match=message):
        read_frame_table(str(path))


def test_missing_files(tmp_path):
    path = make(tmp_path, "a.mp4")
    index = read_frame_table(str(path)).index
    with pytest.raises(Problem, match="missing media"):
        read_frame_table(str(tmp_path / "none.mp4"))
    path.unlink()
    with pytest.raises(Problem, match="missing media"):
        decode_frames(str(path), index, [0], size=TILE)


@pytest.mark.parametrize("numbers", [[N], [-1], [0, N + 5]])
def test_numbers_out_of_range_are_an_error(tmp_path, numbers):
    path = str(make(tmp_path, "a.mp4"))
    index = read_frame_table(path).index
    with pytest.raises(Problem, match=f"no such frame: .*a.mp4: frame {numbers[-1]}, it has {N}, from 0"):
        decode_frames(path, index, numbers, size=TILE)
    with pytest.raises(Problem, match="no such frame: .*a.mp4: frame 4, not in its index"):
        decode_frames(path, index.select([3, 5]), [4], size=TILE)


def test_no_frames_are_none(tmp_path):
    path = str(make(tmp_path, "a.mp4"))
    tiles, times = decode_frames(path, read_frame_table(path).index, [], size=TILE)
    assert (tiles.shape, times.shape) == ((0, 3, TILE, TILE), (0,))


def test_replaced_files_are_found(tmp_path):
    path = make(tmp_path, "a.mp4")
    index = read_frame_table(str(path)).index
    copy = shutil.copyfile(path, tmp_path / "copy.mp4")
    os.utime(copy, ns=(1, 1))
    decode_frames(str(copy), index, [0], size=TILE)  # another date alone is no other file
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(Problem, match="media changed since preprocessing: .* has other content"):
        decode_frames(str(path), index, [0], size=TILE)
    path.write_bytes(data + b"\0")
    with pytest.raises(Problem, match=f"media changed .* has {len(data) + 1} bytes, had {len(data)}"):
        decode_frames(str(path), index, [0], size=TILE)


def test_another_frame_is_never_given(tmp_path):
    """An index that names times which no frame has."""
    path = str(make(tmp_path, "a.mp4"))
    index = read_frame_table(path).index
    with pytest.raises(Problem, match="undecodable frame: .* frame 4 "):
        decode_frames(path, replace(index, pts=index.pts + 1), [4], size=TILE)


DAMAGED = {
    "H.264": ("a.mp4", {}),
    "H.264, transport stream": ("a.ts", {}),
    "HEVC": ("a.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none:bframes=2"}}),
    "MPEG-4": ("a.avi", {"codec": "mpeg4"}),
    "MPEG-2": ("a.mkv", {"codec": "mpeg2video", "fps": 25}),
    "VP9": ("a.webm", {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}}),
    "AV1": ("a.mkv", {"codec": "libsvtav1", "options": {"preset": "12"}}),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("erased", [0, 15, 30])
def test_damage_in_the_middle_is_an_error_or_does_no_harm(tmp_path, name, erased):
    """A packet is overwritten: every frame is the same as before, or raises."""
    path = str(make(tmp_path, *DAMAGED[name]))
    index = read_frame_table(path).index
    whole, _ = decode_frames(path, index, ALL, size=TILE)
    with open_video(path) as container:
        packets = [packet for packet in container.demux(container.streams[index.stream]) if packet.size]
    victim, data = bytes(packets[erased]), Path(path).read_bytes()
    size = min(40, len(victim))
    places = (data.find(victim[start : start + size]) for start in range(len(victim) - size, -1, -1))
    at = next(place for place in places if place >= 0)  # a transport stream cuts packets into pieces
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(np.random.default_rng(erased).bytes(size))
    index = replace(index, fingerprint=0, file=replace(index.file, mtime_ns=os.stat(path).st_mtime_ns))
    lost = []
    for number in ALL:
        try:
            tile, _ = decode_frames(path, index, [number], size=TILE)
        except Problem as problem:
            assert problem.kind in ("undecodable frame", "unreadable video")
            lost.append(number)
        else:
            assert torch.equal(tile[0], whole[number]), number
    assert lost


@need_media
def test_real_damage():
    path = str(MEDIA / "video" / "decord_corrupted.mp4")
    index = read_frame_table(path).index
    decode_frames(path, index, [0, 10, 27], size=TILE)
    with pytest.raises(Problem, match="undecodable frame: .* frame 28 "):
        decode_frames(path, index, [0, 28], size=TILE)
