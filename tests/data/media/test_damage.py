"""Damaged pictures are refused where their format lets it be seen; no value is read at a wrong scale."""

import io
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_eagle.data.media.damage import jpeg_warning, need_simplejpeg
from megatron_eagle.data.media.images import image_size, load_image
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem
from tests.data.helpers import call_tool, conversation, write_jsonl

# Name -> what it is saved with.  Only PNG has checksums of everything.
OPTIONS: dict[str, dict] = {
    "a.png": {},
    "a.webp": {},
    "lossless.webp": {"lossless": True},
    "a.tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
    "zip.tif": {"compression": "tiff_adobe_deflate"},
    "a.bmp": {},
    "a.gif": {},
    "a.jpg": {},
    "progressive.jpg": {"progressive": True},
}


def photo() -> Image.Image:
    """Smooth, with noise: 48 x 32 pixels."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 48)[None, :, None] + np.zeros((32, 1, 3))
    return Image.fromarray((ramp + rng.integers(0, 50, ramp.shape)).astype(np.uint8))


def saved(name: str) -> bytes:
    stream = io.BytesIO()
    image_format = {"tif": "TIFF", "jpg": "JPEG"}.get(name.split(".")[1], name.split(".")[1].upper())
    photo().save(stream, image_format, **OPTIONS[name])
    return stream.getvalue()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_flipped_bit(tmp_path_factory, name):
    """Of a PNG it is refused; elsewhere it is one line or a picture, never another error."""
    path = tmp_path_factory.mktemp("flips") / name
    good = saved(name)
    path.write_bytes(good)
    expected = load_image(str(path))

    @settings(max_examples=120 if name == "a.png" else 25)
    @given(st.integers(0, 8 * len(good) - 1))
    def flip(bit):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        for read in (image_size, load_image):
            try:
                found = read(str(path))
            except Problem:
                continue
            assert name != "a.png" or found in (expected, expected.size)

    flip()


def test_damage_in_a_png_that_decodes(tmp_path):
    """The pixels' last bytes, of which the decoder has no need, and a block of zeros in their middle."""
    good = saved("a.png")
    start, size = good.index(b"IDAT") + 4, struct.unpack(">I", good[good.index(b"IDAT") - 4 :][:4])[0]
    path = tmp_path / "a.png"
    for first, last in ((size - 4, size), (size // 2, size // 2 + 64)):
        path.write_bytes(good[: start + first] + bytes(last - first) + good[start + last :])
        for read in (image_size, load_image):
            with pytest.raises(Problem, match="unreadable image"):
                read(str(path))
    path.write_bytes(good[:-12])
    with pytest.raises(Problem, match="truncated: the file ends before its chunk 'IEND'"):
        image_size(str(path))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "jpeg"])
@pytest.mark.parametrize("pages", [1, 2])
def test_a_tiff_is_turned_once(tmp_path, compression, pages):
    exif = Image.Exif()
    exif[274] = 6
    picture = Image.new("RGB", (64, 32))
    picture.paste((255, 0, 0), (0, 0, 32, 32))  # what is left becomes what is up
    more = {"save_all": True, "append_images": [picture]} if pages > 1 else {}
    picture.save(tmp_path / "a.tif", exif=exif, compression=compression, **more)
    path = str(tmp_path / "a.tif")
    loaded = load_image(path)
    assert image_size(path) == loaded.size == (32, 64)
    assert loaded.getpixel((16, 8))[0] > 200 > 50 > loaded.getpixel((16, 56))[0]


def tiff(values: np.ndarray, bits: int, sample_format: int = 1, photometric: int = 1) -> bytes:
    """An uncompressed grey TIFF file of values [h, w] whose bytes are those of the file."""
    height = 4
    tags = [(256, 16), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    tags += [(278, height), (279, values.nbytes), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + values.nbytes)
    return head + values.tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4)


RAMP = np.linspace(0, 1, 16)[None].repeat(4, 0)


def packed12(levels: np.ndarray) -> np.ndarray:
    """Two values of 12 bits in three bytes each."""
    first, second = (RAMP * levels).astype(np.uint16).reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8)


DEEP = {
    "12 bits": tiff(packed12(4095), 12),
    "16 bits": tiff((RAMP * 65535).astype("<u2"), 16),
    "16 bits, 0 is white": tiff((RAMP[:, ::-1] * 65535).astype("<u2"), 16, photometric=0),
    "PGM": b"P5 16 4 4095\n" + (RAMP * 4095).astype(">u2").tobytes(),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_pictures_are_scaled(tmp_path, kind):
    (tmp_path / "a").write_bytes(DEEP[kind])
    found = np.asarray(load_image(str(tmp_path / "a")))[..., 0]
    assert np.abs(found - RAMP * 255).max() <= 1
    assert image_size(str(tmp_path / "a")) == (16, 4)


@pytest.mark.parametrize(
    "content",
    [
        tiff((RAMP * 2**31).astype("<u4"), 32),
        tiff((RAMP * 2**30).astype("<i4"), 32, 2),
        tiff((RAMP * 2**14).astype("<i2"), 16, 2),
        tiff(RAMP.astype("<f4"), 32, 3),
        tiff(RAMP.astype("<f8"), 64, 3),
        b"Pf\n16 4\n-1.0\n" + RAMP.astype("<f4").tobytes(),
    ],
)
def test_values_without_a_scale_are_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    for read in (image_size, load_image):
        with pytest.raises(Problem, match="which have no white|no picture of a known format"):
            read(str(tmp_path / "a"))


def test_what_libjpeg_warns_of(tmp_path, tokenizer_dir, monkeypatch):
    """A setting puts it into the ledger; without it the sample is kept, as Pillow reads it."""
    pytest.importorskip("simplejpeg")
    good = saved("a.jpg")
    assert not jpeg_warning(good) and not jpeg_warning(saved("a.png"))
    for mode in ("L", "CMYK"):
        stream = io.BytesIO()
        photo().convert(mode).save(stream, "JPEG")
        assert not jpeg_warning(stream.getvalue())
    rng = random.Random(0)
    for _ in range(200):  # one that Pillow reads without a word
        bad = bytearray(good)
        bad[rng.randrange(len(good) // 2, len(good))] ^= 255
        (tmp_path / "bad.jpg").write_bytes(bad)
        if jpeg_warning(bytes(bad)):
            image_size(str(tmp_path / "bad.jpg"))
            break
    with pytest.raises(Problem, match="doubtful image: .*bad.jpg: libjpeg warns: [A-Z]"):
        image_size(str(tmp_path / "bad.jpg"), strict_jpeg=True)
    (tmp_path / "good.jpg").write_bytes(good)
    records = [conversation("<image>?", "x", image=name) for name in ("good.jpg", "bad.jpg")]
    recipe = write_jsonl(tmp_path / "data.jsonl", records)
    assert "2 lines, 0 with a problem" in call_tool("preview_data", "lint", recipe).stdout
    assert "doubtful image: 1" in call_tool("preview_data", "lint", recipe, "--strict-jpeg").stdout
    (tmp_path / "recipe.json").write_text('{"d": {"annotation": "data.jsonl"}}')
    arguments = ["run", "--recipe", tmp_path / "recipe.json", "--tokenizer", tokenizer_dir]
    arguments += ["--output", tmp_path / "store", "--max-tokens", 300, "--tile-size", 28, "--workers", 1]
    call_tool("preprocess_data", *arguments)
    assert not (tmp_path / "store/dropped.jsonl").read_text()
    call_tool("preprocess_data", *arguments, "--strict-jpeg")
    assert "doubtful image" in (tmp_path / "store/dropped.jsonl").read_text()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--strict-jpeg needs simplejpeg: pip install"):
        need_simplejpeg()
