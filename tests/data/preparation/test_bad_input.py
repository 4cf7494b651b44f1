"""Everything that can be wrong with input: each is one ledger line with its reason, and the rest goes on."""

import errno
import json
import struct
import tracemalloc
import zlib

import av
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from megatron_eagle.data.media.images import image_size, load_image
from megatron_eagle.data.packing.index import read_packs, write_packs
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.data.text.tokenizer import load_tokenizer
from megatron_eagle.errors import UserError
from tests.data.helpers import conversation, make_image, make_pdf, make_store, make_video, write_pdf

LONG = "word " * 200_000  # a million tokens


def png_bomb(path):
    """A PNG of 200 bytes whose header promises 60,000 x 60,000 pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data)


def no_frames(path, *, audio):
    """A video file without a frame: nothing but a header, or nothing but sound."""
    with av.open(str(path), "w") as container:
        if audio:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        else:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            container.start_encoding()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    good = make_image(folder / "good.png", (30, 20))
    (folder / "zero.png").touch()
    (folder / "cut.png").write_bytes(good.read_bytes()[:-100])
    (folder / "photo.jpg").write_text("not a picture")
    png_bomb(folder / "bomb.png")
    make_image(folder / "large.png", (1001, 1000))
    no_frames(folder / "header.mp4", audio=False)
    no_frames(folder / "sound.mp4", audio=True)
    clip = make_video(folder / "clip.mp4", 30).read_bytes()
    (folder / "cut.mp4").write_bytes(clip[: len(clip) // 2])
    (folder / "zero.mp4").touch()
    bad_documents(folder)
    return folder


def bad_documents(folder):
    """PDF files that cannot be read, each in its own way, and `good.pdf`."""
    good = make_pdf(folder / "good.pdf", 3).read_bytes()
    (folder / "zero.pdf").touch()
    (folder / "cut.pdf").write_bytes(good[:-20])
    (folder / "half.pdf").write_bytes(good[: len(good) // 2])
    (folder / "text.pdf").write_text("not a document")
    (folder / "mark.pdf").write_bytes(b"%PDF-1.7\nnothing in between\n%%EOF")
    make_pdf(folder / "pageless.pdf", 0)
    make_pdf(folder / "long.pdf", 10_001)
    password = b"<</Filter/Standard/V 1/R 2/P -4/O<%s>/U<%s>>>" % (b"11" * 32, b"22" * 32)
    pages = [b"<</Type/Pages/Count 1/Kids[3 0 R]>>", b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 60 80]>>"]
    catalog = b"<</Type/Catalog/Pages 2 0 R>>"
    write_pdf(folder / "locked.pdf", [catalog, *pages, password], "/Encrypt 4 0 R/ID[<00><00>]")
    loop = b"<</Type/Pages/Count 1/Kids[2 0 R]>>"
    write_pdf(folder / "loop.pdf", [catalog, loop])
    drawn = pages[1].replace(b"]>>", b"]/Contents 4 0 R/Resources<</XObject<</I 5 0 R>>>>>>")
    draw = b"<</Length 29>>stream\nq 60 0 0 80 0 0 cm /I Do Q    \nendstream"
    size = b"/Width 30000/Height 30000/BitsPerComponent 1/ColorSpace/DeviceGray"
    bomb = b"<</Type/XObject/Subtype/Image%s/Length 1>>stream\n0\nendstream" % size
    write_pdf(folder / "bomb.pdf", [catalog, pages[0], drawn, draw, bomb])


def picture(name):
    return conversation("<image>", "x", image=name)


def video(name, **clip):
    return conversation("<video>", "x", video={"video": name, **clip})


def document(name):
    return conversation("<document>", "x", document=name)


# Each line of input, and why it is dropped (None: it is kept).
LINES = [
    (conversation("Hello", "Hi"), None),
    ('{"conversations": [', "broken JSON"),
    ('{"a": "\0"}', "broken JSON"),
    ("", "empty line"),
    ('["a", "list"]', "not a record"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "unknown role"),
    (conversation("Hello", ""), "empty answer"),
    (picture("none.png"), "missing media"),
    (picture("."), "unreadable image"),
    (picture("zero.png"), "empty file"),
    (picture("cut.png"), "unreadable image"),
    (picture("photo.jpg"), "unreadable image"),
    (picture("bomb.png"), "image too large"),
    (picture("large.png"), "image too large"),
    (picture("a\0b.png"), "bad media reference"),
    (picture("https://example.org/a.png"), "remote media are off"),
    (picture("good.png"), None),
    (video("none.mp4"), "missing media"),
    (video("zero.mp4"), "empty file"),
    (video("header.mp4"), "unreadable video"),
    (video("sound.mp4"), "unreadable video"),
    (video("good.png.mp4"), "missing media"),
    (video("cut.mp4"), "truncated video"),
    (video("clip.mp4", start=100, end=110), "empty clip"),
    (video("clip.mp4", start=2, end=1), "empty clip"),
    (video("clip.mp4"), None),
    (document("none.pdf"), "missing media"),
    (document("zero.pdf"), "empty file"),
    (document("cut.pdf"), "truncated document"),
    (document("half.pdf"), "truncated document"),
    (document("text.pdf"), "unreadable document"),
    (document("mark.pdf"), "unreadable document"),
    (document("pageless.pdf"), "unreadable document"),
    (document("loop.pdf"), "unreadable document"),
    (document("long.pdf"), "too many pages"),
    (document("locked.pdf"), "encrypted document"),
    (document("bomb.pdf"), "image too large"),
    (document("good.pdf"), None),
    (conversation("<document>", "x", document=["good.png", "none.png"]), "missing media"),
    (conversation("<document>", "x", document=["good.png", "good.png"]), None),
    (conversation(LONG, "x"), "too long"),
    (conversation("Hi", LONG), "too long"),
    (conversation("a\0b and \x7f", "\0"), None),
    (conversation("مرحبا بالعالم \u202e abc \u202c", "שלום"), None),
]


def test_every_line_is_kept_or_in_the_ledger_with_its_reason(folder, tokenizer_dir):
    records = [record for record, _ in LINES]
    path = make_store(folder, tokenizer_dir, records, (500, 32768), max_pixels=1_000_000)
    ledger = [json.loads(line) for line in (path / "dropped.jsonl").open()]
    for length in (500, 32768):
        store = SampleStore(path, length)
        dropped = {e["line"]: e["kind"] for e in ledger if e["length"] in (None, length)}
        assert dropped == {line: kind for line, (_, kind) in enumerate(LINES, 1) if kind}
        assert [store[i].line for i in range(len(store))] == [i for i, (_, k) in enumerate(LINES, 1) if not k]
        counts = store.manifest.counts[str(length)]
        assert counts["input"] == len(LINES) == counts["kept"] + sum(counts["dropped"].values())
    for entry in ledger:
        assert entry["file"] == str(folder / "data.jsonl")
        assert entry["reason"].startswith(entry["kind"])
        assert len(entry["reason"]) < 400
    too_long = next(entry for entry in ledger if entry["kind"] == "too long")
    tokens = int(too_long["reason"].split(" tokens")[0].split()[-1])
    assert tokens > 1_000_000
    assert too_long["reason"] == f"too long: needs at least {tokens} tokens, the limit is 500"


def test_strange_text_is_kept_to_the_letter(folder, tokenizer_dir):
    records = [record for record, _ in LINES[-2:]]
    store = SampleStore(make_store(folder, tokenizer_dir, records, (500,)))
    tokenizer = load_tokenizer(tokenizer_dir)
    for row, record in enumerate(records):
        text = tokenizer.decode(store[row].ids.tolist())
        for turn in record["conversations"]:
            assert f"\n{turn['value']}<|im_end|>" in text


def test_a_bomb_is_refused_by_its_header(folder):
    tracemalloc.start()
    for reader in (image_size, load_image):
        with pytest.raises(Exception, match="image too large"):
            reader(str(folder / "bomb.png"))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_the_pixel_limit_has_limits(tokenizer_dir):
    for wrong in (0, 10**9):
        with pytest.raises(UserError, match="--max-pixels must be from 1 to 178956970"):
            PreprocessSettings(str(tokenizer_dir), (300,), max_pixels=wrong)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tiff"])
def test_of_an_animation_the_first_picture_counts(tmp_path, name):
    pictures = [Image.new("RGB", (20, 10), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if name.endswith("webp") else {}
    pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], **options)
    assert Image.open(tmp_path / name).n_frames == 3
    assert image_size(str(tmp_path / name)) == (20, 10)
    assert load_image(str(tmp_path / name)).getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.png" if mode in ("L", "LA", "P", "RGBA", "1", "I;16") else "a.tiff")
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 8), 100 << 8, np.uint16))
    elif mode == "LAB":
        image = Image.new("LAB", (8, 4), (110, 128, 128))
    else:
        image = Image.new("RGB", (8, 4), 100).convert(mode)
    image.save(path)
    loaded = load_image(str(path))
    assert (loaded.mode, loaded.size, image_size(str(path))) == ("RGB", (8, 4), (8, 4))


def test_a_full_disk_while_packing(tmp_path, tokenizer_dir, monkeypatch):
    path = make_store(tmp_path, tokenizer_dir, [conversation("Hi", "Ho")], (300,))
    write_packs(path, 300, 0)

    class Full:
        def __init__(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pa, "OSFile", Full)
        with pytest.raises(UserError, match=r"cannot write .*packs\.arrow: No space left on device"):
            write_packs(path, 300, 1)
    assert len(read_packs(SampleStore(path))) == 1
