"""Sparse remux: what it copies decodes to the same bits as the file, for every kind of clip."""

import io
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest

from megatron_eagle.data.media.exact import read_frames
from megatron_eagle.data.media.frame_index import read_frame_table
from megatron_eagle.data.media.remux import RemuxRefused, sparse_remux
from megatron_eagle.problems import Problem
from tests.data.helpers import frame_number, make_video

N_FRAMES = 40
VARIABLE = [0, 30, 200, 210, 700, *range(720, 720 + 17 * 35, 17)]  # uneven times in ms


def repack(source, target, *, shift=0, skip=0, audio=False):
    """Copy a clip without decoding: times moved by `shift` frames, the first `skip` frames left out."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        if audio:  # ahead of the video, so that the video is not the first stream
            sound = new.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.rate = 8000
        stream = new.add_stream_from_template(old.streams.video[0])
        if audio:
            new.mux(sound.encode(frame))
            new.mux(sound.encode())
        for number, packet in enumerate(p for p in old.demux(video=0) if p.size):
            step = packet.duration
            packet.pts += shift * step
            packet.dts += shift * step
            packet.stream = stream
            if number >= skip:
                new.mux(packet)
    return target


KINDS = {
    "b_frames.mp4": {},
    "b_frames.mkv": {},
    "b_frames.mov": {},
    "all_key.mp4": {"gop": 1},
    "long_gop.mp4": {"gop": 250},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "mpeg2.mp4": {"codec": "mpeg2video"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp9.mp4": {"codec": "libvpx-vp9"},
    "av1.webm": {"codec": "libsvtav1"},
    "variable.mkv": {"pts": VARIABLE},
    "variable.mp4": {"pts": VARIABLE},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Every kind of clip by name, made once."""
    folder = tmp_path_factory.mktemp("clips")
    made = {
        name: make_video(folder / name, N_FRAMES, **{"gop": 7, "size": (128, 96), **options})
        for name, options in KINDS.items()
    }
    plain = made["b_frames.mp4"]
    made["edit_list.mp4"] = repack(plain, folder / "edit_list.mp4", shift=-10)
    made["late_start.mkv"] = repack(plain, folder / "late_start.mkv", shift=25)
    made["cut.mp4"] = repack(plain, folder / "cut.mp4", skip=7)
    made["audio_first.mp4"] = repack(plain, folder / "audio_first.mp4", audio=True)
    return made


def decode(data):
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


ALL = [*KINDS, "edit_list.mp4", "late_start.mkv", "cut.mp4", "audio_first.mp4"]


@pytest.mark.parametrize("name", ALL)
def test_copies_decode_to_the_same_bits(clips, name):
    path = str(clips[name])
    index = read_frame_table(path).index
    first = frame_number(next(read_frames(path, index.select([0]))).to_ndarray(format="rgb24"))
    n = index.n_frames
    for wanted in (range(n), [0, 8, 9, 20, n - 1], [n // 2], [n - 1]):
        chosen = index.select(wanted)
        remux = sparse_remux(path, chosen)
        frames = decode(remux.data)
        exact = [frame.to_ndarray(format="rgb24") for frame in read_frames(path, chosen)]
        assert len(frames) == remux.n_frames
        assert [frame_number(frames[i]) for i in remux.frames] == [first + number for number in wanted]
        for number, frame in zip(remux.frames, exact, strict=True):
            np.testing.assert_array_equal(frames[number], frame)


def test_only_what_is_needed_is_copied(clips):
    path = str(clips["b_frames.mp4"])
    index = read_frame_table(path).index
    remux = sparse_remux(path, index.select([9, 30]))
    assert remux.n_frames <= 4 + 4  # the third frame of the second group of 7, and of the fifth
    assert remux.reorder == 1
    with av.open(io.BytesIO(remux.data)) as copy:
        times = [frame.pts * copy.streams.video[0].time_base for frame in copy.decode(video=0)]
    assert times == [Fraction(i, 25) for i in range(remux.n_frames)]
    assert sparse_remux(path, index.select([0])).data.count(b"mdat") == 1
    assert len(remux.data) < len(sparse_remux(path, index).data) < 2 * clips["b_frames.mp4"].stat().st_size


REFUSED = {
    "stream.ts": ({}, "transport stream"),
    "b_frames.avi": ({"codec": "mpeg4"}, "container avi"),
    "open.mp4": ({"options": {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=8"}}, "open GOP"),
    "hevc.mp4": ({"codec": "libx265", "options": {"x265-params": "log-level=none"}}, "open GOP"),
    "444.mp4": ({"pix_fmt": "yuv444p"}, "pixel format yuv444p"),
    "10_bit.mkv": ({"pix_fmt": "yuv420p10le"}, "pixel format yuv420p10le"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_copied_is_refused_with_a_reason(tmp_path, name):
    options, reason = REFUSED[name]
    path = str(make_video(tmp_path / name, N_FRAMES, **{"gop": 8, "size": (128, 96), **options}))
    index = read_frame_table(path).index
    with pytest.raises(RemuxRefused, match=reason):
        sparse_remux(path, index)
    if reason == "open GOP":  # also where only key frames are copied
        with pytest.raises(RemuxRefused, match="a key frame does not reset"):
            sparse_remux(path, replace(index.select([0, 8, 16]), open_gop=False))


def test_other_key_frames_and_packets_are_noticed(clips):
    path = str(clips["b_frames.mp4"])
    index = read_frame_table(path).index.select([9])
    with pytest.raises(RemuxRefused, match="seeking does not lead to a key frame"):
        sparse_remux(path, replace(index, seek_points=index.seek_points + 1))
    with pytest.raises(RemuxRefused, match="seeking does not lead to its frames"):
        sparse_remux(path, replace(index, pts=index.pts + 1))
    with pytest.raises(Problem, match="missing media"):
        sparse_remux(path + "x", index)


def test_packets_with_hidden_pictures_are_marked(clips, tmp_path):
    def hide(codec, data):
        if codec == "vp8":
            return bytes([data[0] & ~0x10]) + data[1:]  # the bit that says whether the picture is shown
        sizes = len(data).to_bytes(2, "little") * 2  # two pictures in one packet: the index at its end
        return data + data + b"\xc9" + sizes + b"\xc9"

    for name, codec in (("vp8.webm", "vp8"), ("vp9.webm", "vp9")):
        assert not sparse_remux(str(clips[name]), read_frame_table(str(clips[name])).index).hidden_frames
        path = tmp_path / name
        with av.open(str(clips[name])) as old, av.open(str(path), "w") as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            for number, packet in enumerate(p for p in old.demux(video=0) if p.size):
                copy = av.Packet(hide(codec, bytes(packet)) if number == 8 else bytes(packet))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                new.mux(copy)
        index = read_frame_table(str(path)).index
        assert sparse_remux(str(path), index).hidden_frames
        assert not sparse_remux(str(path), index.select([20])).hidden_frames
