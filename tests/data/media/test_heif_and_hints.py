"""HEIC pictures, pictures inside of their address, and hints at frequent mistakes."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from megatron_eagle.data.media.images import image_size, load_image
from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.sampling.ads import SamplingSettings
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.hf_model.pictures import open_picture, to_rgb
from megatron_eagle.problems import Problem
from tests.data.helpers import conversation, make_image, make_store, read_media, write_jsonl


@pytest.fixture
def heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    make_image(tmp_path / "a.png", (60, 40))
    with Image.open(tmp_path / "a.png") as image:
        pillow_heif.from_pillow(image).save(tmp_path / "a.heic", quality=90)
    return tmp_path / "a.heic"


def test_heic_is_read_the_same_everywhere(heic, tmp_path, tokenizer_dir):
    assert image_size(str(heic)) == (60, 40)
    ours = np.asarray(load_image(str(heic)))
    with open_picture(io.BytesIO(heic.read_bytes())) as image:  # as an export does
        assert np.array_equal(np.asarray(to_rgb(image)), ours)
    with Image.open(tmp_path / "a.png") as original:
        assert np.abs(ours.astype(int) - np.asarray(original)).mean() < 12
    store = SampleStore(make_store(tmp_path, tokenizer_dir, [conversation("<image>?", "A.", image="a.heic")]))
    assert len(store) == 1 and read_media(store, 0)[0].shape[1:] == (3, 28, 28)
    heic.write_bytes(heic.read_bytes()[:-50])
    with pytest.raises(Problem, match="unreadable image: .*a.heic"):
        image_size(str(heic))


def test_without_its_reader_heic_is_one_line(heic, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    line = "it is in HEIC, which needs pillow-heif: pip install pillow-heif"
    for source in (heic, io.BytesIO(heic.read_bytes())):
        with pytest.raises(OSError, match=line):
            open_picture(source)
    with pytest.raises(Problem, match=f"unreadable image: .*a.heic: {line}"):
        image_size(str(heic))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize("kind, name", [("image", "a.jpg"), ("video", "a.mp4"), ("document", "a.pdf")])
def test_pointers_and_backslashes_get_a_hint(kind, name, tmp_path, tokenizer_dir):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / name).write_text(POINTER)
    records = [
        conversation(f"<{kind}>?", "A.", **{kind: f"sub/{name}"}),
        conversation(f"<{kind}>?", "A.", **{kind: f"sub\\{name}"}),
        conversation(f"<{kind}>?", "A.", **{kind: f"none\\{name}"}),
    ]
    store = make_store(tmp_path, tokenizer_dir, records)
    lines = [json.loads(line)["reason"] for line in (store / "dropped.jsonl").open()]
    assert lines[0].endswith("; it is a pointer of git-lfs, not the file itself; run git lfs pull")
    hint = f"; its name has backslashes, as on Windows; write {tmp_path}"
    assert lines[1].endswith(f"{hint}/sub/{name}, that file is there")
    assert lines[2].endswith(f"{hint}/none/{name}")


def test_pictures_in_their_address_go_into_the_store(tmp_path, tokenizer_dir):
    """The same rows and pixels as from files; broken ones are short lines."""
    content = make_image(tmp_path / "a.png", (60, 40)).read_bytes()
    address = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    records = [
        conversation("<image>?", "A.", image="a.png"),
        conversation("<image>?", "A.", image=address),
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": address}}]},
                {"role": "assistant", "content": "A."},
            ]
        },
        conversation("<image>?", "A.", image=address[:-401]),
        conversation("<image>?", "A.", image=address.replace("iVBOR", "iV!OR")),
        conversation("<image>?", "A.", image="data:text/plain;base64,QUJD"),
        conversation("<video>?", "A.", video=address),
    ]
    write_jsonl(tmp_path / "data.jsonl", records)
    (tmp_path / "recipe.json").write_text(json.dumps({"data": {"annotation": "data.jsonl"}}))
    settings = PreprocessSettings(str(tokenizer_dir), (256,), SamplingSettings(tile_size=28))
    preprocess(tmp_path / "recipe.json", tmp_path / "store", settings, Execution(1))
    store = SampleStore(tmp_path / "store")
    lines = [json.loads(line) for line in (tmp_path / "store" / "dropped.jsonl").open()]
    assert {line["line"] for line in lines} == {4, 5, 6, 7}
    assert all(len(line["reason"]) < 300 for line in lines), [line["reason"] for line in lines]
    assert len(store) == 3
    assert store[1].images[0].path == store[2].images[0].path
    assert store[1].images[0].path.startswith(f"tar://{tmp_path}/store/media/00000.tar")
    first, *others = (read_media(store, row)[0] for row in range(3))
    assert all((first == other).all() for other in others)
