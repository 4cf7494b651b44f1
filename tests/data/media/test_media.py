"""Pictures upright and in RGB, videos frame-exact, damage found before training."""

import struct
import zlib
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from megatron_eagle.data.media.exact import read_frames, upright
from megatron_eagle.data.media.frame_index import read_frame_table
from megatron_eagle.data.media.images import image_size, load_image
from megatron_eagle.data.sample import VideoSource
from megatron_eagle.data.sampling.probe import probe_image, probe_video
from megatron_eagle.hf_model.tiles import image_tiles, normalize
from megatron_eagle.problems import Problem
from tests.data.helpers import frame_number, load_frames, make_image, make_video
from tests.paths import MEDIA, need_media


@pytest.mark.parametrize("format", ["png", "tiff"])  # Pillow turns a TIFF itself
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path, orientation, format):
    path = str(tmp_path / f"a.{format}")
    picture = np.zeros((4, 6, 3), np.uint8)
    picture[0, 0] = 255  # the corner tells all eight apart together with the shape
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(picture).save(path, exif=exif)
    size = (6, 4) if orientation < 5 else (4, 6)
    assert image_size(path) == size == load_image(path).size
    corner = {1: (0, 0), 2: (0, 5), 3: (3, 5), 4: (3, 0), 5: (0, 0), 6: (0, 3), 7: (5, 3), 8: (5, 0)}
    bright = np.argwhere(np.asarray(load_image(path)).sum(-1) > 0)
    assert bright.tolist() == [list(corner[orientation])]


def test_modes_become_rgb(tmp_path):
    alpha = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    alpha.putpixel((0, 0), (0, 0, 255, 255))
    grey16 = Image.fromarray(np.full((2, 2), 0x8000, np.uint16))
    cases = {
        "alpha.png": (alpha, [(0, 0, 255), (255, 255, 255)]),
        "grey16.png": (grey16, [(128, 128, 128)] * 2),
        "palette.gif": (Image.new("P", (2, 2), 0), None),
        "cmyk.jpg": (Image.new("CMYK", (2, 2), (0, 0, 0, 255)), [(0, 0, 0)] * 2),
        "bit.png": (Image.new("1", (2, 2), 1), [(255, 255, 255)] * 2),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        loaded = load_image(str(tmp_path / name))
        assert (loaded.mode, loaded.size) == ("RGB", (2, 2))
        if expected:
            assert [loaded.getpixel((x, 0)) for x in (0, 1)] == expected


def test_bad_pictures_say_what_is_wrong(tmp_path):
    good = make_image(tmp_path / "good.jpg", (300, 200))
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[:-400])
    png = make_image(tmp_path / "good.png", (300, 200)).read_bytes()
    (tmp_path / "cut.png").write_bytes(png[: len(png) // 2])
    for name, message in {
        "none.jpg": "missing media",
        "good.jpg/x": "missing media",
        "empty.jpg": "empty file",
        "text.jpg": "unreadable image: .* no picture of a known format",
        "cut.jpg": "unreadable image: .* truncated",
        "cut.png": "unreadable image",
    }.items():
        with pytest.raises(Problem, match=message):
            image_size(str(tmp_path / name))
    with pytest.raises(Problem, match="image too large: .* has 300x200 pixels, limit 59999"):
        image_size(str(good), max_pixels=59_999)
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(png + struct.pack(">I", 9) + b"IDAT" + bytes(13))
    with pytest.raises(Problem, match="image too large"):
        image_size(str(tmp_path / "bomb.png"))
    facts = probe_image(str(good), 60_000)
    assert (facts.width, facts.height, facts.file.size) == (300, 200, good.stat().st_size)


def test_tiles_go_row_by_row_and_end_with_the_thumbnail():
    colours = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    pixels = np.repeat(np.repeat(colours, 8, 0), 8, 1)[..., None].repeat(3, 2)
    tiles = normalize(image_tiles(pixels, (3, 2), 8))
    assert tiles.shape == (7, 3, 8, 8)
    expected = (torch.arange(6) * 40 / 255 - 0.5) / 0.5
    torch.testing.assert_close(tiles[:6, 0, 4, 4], expected)
    torch.testing.assert_close(tiles[6, 0, 2, 1], expected[0], atol=0.1, rtol=0)
    assert image_tiles(pixels, (1, 1), 8).shape == (1, 3, 8, 8)


def frames_of(path, wanted):
    index = read_frame_table(str(path)).index.select(wanted)
    return [frame_number(upright(frame, index.rotation)) for frame in read_frames(str(path), index)]


VFR = [
    0,
    30,
    200,
    210,
    700,
    720,
    1500,
    1501,
    1600,
    3000,
    3100,
    3200,
    4000,
    4500,
    5000,
    5100,
    5200,
    6000,
    6001,
    6100,
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("b_frames.mp4", {}),
        ("mpeg4.avi", {"codec": "mpeg4"}),
        ("vp9.webm", {"codec": "libvpx-vp9"}),
        ("variable.mkv", {"pts": VFR, "n_frames": 20}),
        ("stream.ts", {}),  # seeks miss here: the linear pass takes over
    ],
)
def test_frames_are_exact(tmp_path, name, options):
    path = make_video(tmp_path / name, **{"n_frames": 30, "gop": 7, **options})
    n = len(read_frame_table(str(path)).pts)
    assert n == options.get("n_frames", 30)
    for wanted in (list(range(n)), [0, 9, 10, n - 1], [n - 1]):
        assert frames_of(path, wanted) == wanted


def test_loaded_frames_are_upright_tiles(tmp_path):
    path = str(make_video(tmp_path / "a.mp4"))
    index = read_frame_table(path).index
    tiles = load_frames(path, index, [3, 17], tile_size=32)
    assert tiles.shape == (2, 3, 32, 32)
    assert tiles.abs().max() <= 1
    turned = load_frames(path, replace(index, rotation=-90), [3, 17], tile_size=32)
    torch.testing.assert_close(turned, tiles.rot90(-1, (2, 3)), atol=0.05, rtol=0)


def test_missing_frame_is_an_error_never_a_neighbour(tmp_path):
    path = str(make_video(tmp_path / "a.mp4"))
    index = read_frame_table(path).index.select([4])
    with pytest.raises(Problem, match="undecodable frame"):
        list(read_frames(path, replace(index, pts=index.pts + 1)))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "faststart.mp4"])
def test_truncated_videos_are_found(tmp_path, name):
    path = make_video(tmp_path / name, codec="mpeg4" if name == "a.avi" else "libx264")
    if name == "faststart.mp4":
        path = remux(path, tmp_path / "moved.mp4", movflags="faststart")
    read_frame_table(str(path))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(Problem, match="truncated video|unreadable video"):
        read_frame_table(str(path))


def remux(source, target, **options):
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return target


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_damage_inside_a_video_is_found(tmp_path, codec):
    path = make_video(tmp_path / "a.mp4", 60, gop=100, size=(256, 128), codec=codec)
    data = bytearray(path.read_bytes())
    begin = data.index(b"mdat")
    middle = begin + int.from_bytes(data[begin - 4 : begin], "big") // 2
    data[middle : middle + 60] = bytes(60)
    path.write_bytes(data)
    assert frames_of(path, [0, 8]) == [0, 8]
    with pytest.raises(Problem, match="undecodable frame"):
        frames_of(path, list(range(60)))


def test_tags_need_not_be_utf8(tmp_path):
    path = make_video(tmp_path / "a.mp4", 12)
    path.write_bytes(path.read_bytes().replace(b"isomiso2", b"isomi\xe7o2"))
    assert frames_of(path, [11]) == [11]


def test_bad_videos_say_what_is_wrong(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello")
    for name, message in {
        "none.mp4": "missing media",
        "empty.mp4": "empty file",
        "text.mp4": "unreadable video",
    }.items():
        with pytest.raises(Problem, match=message):
            read_frame_table(str(tmp_path / name))


def test_durations_and_clips_are_exact(tmp_path):
    path = str(make_video(tmp_path / "a.mp4", 30, fps=10))
    whole = probe_video(VideoSource(path))
    assert (whole.first, whole.last, whole.duration) == (0, 29, Fraction(3))
    clip = probe_video(VideoSource(path, Fraction("0.7"), Fraction("1.2")))
    assert (clip.first, clip.last, clip.duration) == (7, 11, Fraction(1, 2))
    assert clip.times([7, 11]) == pytest.approx([0.7, 1.1])
    tail = probe_video(VideoSource(path, start=Fraction(2)))
    assert (tail.first, tail.last, tail.duration) == (20, 29, Fraction(1))
    variable = probe_video(VideoSource(str(make_video(tmp_path / "v.mkv", 20, pts=VFR))))
    assert variable.duration == Fraction(6100, 1000) * Fraction(20, 19)
    with pytest.raises(Problem, match="empty clip: .* shows no frame from 3 s to 4 s"):
        probe_video(VideoSource(path, Fraction(3), Fraction(4)))


@need_media
def test_real_videos():
    counts = {
        "tc_av1.mkv": 125,
        "decord_unordered.mov": 4,
        "lf_2.avi": 270,
        "tc_h265_10bit.mp4": 30,
        "decord_rot90.mov": 3,
    }
    for name, n in counts.items():
        path = str(MEDIA / "video" / name)
        table = read_frame_table(path)
        assert len(table.pts) == n
        tiles = load_frames(path, table.index, [0, n // 2, n - 1], tile_size=16)
        assert tiles.shape == (3, 3, 16, 16)
    assert table.rotation == -90
    corrupted = str(MEDIA / "video" / "decord_corrupted.mp4")
    with pytest.raises(Problem, match="undecodable frame"):
        frames_of(corrupted, [0, 20, 49])
