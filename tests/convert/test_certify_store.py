"""`convert certify --store`: samples told back from their ids, clips found again, what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest

from megatron_eagle.certify.certifying import CertifySettings, certify
from megatron_eagle.certify.store_samples import AskedOfStore
from megatron_eagle.certify.told_back import UntoldError, tell_back
from megatron_eagle.commands import convert
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.data.text.template import Template
from megatron_eagle.data.text.tokenizer import load_tokenizer
from megatron_eagle.errors import UserError
from tests.convert.hf_folder import TILE
from tests.data.helpers import make_image, make_pdf, make_store, make_video

CUTTING = {"tile_size": TILE, "tiling": "iap", "max_tiles": 6}


def turn(role, *content):
    parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
    return {"role": role, "content": parts if role == "user" else content[0]}


def records(folder: Path) -> list[dict]:
    """Of every kind of medium and turn."""
    for name, size in (("wide.png", (300, 90)), ("tall.jpg", (50, 170)), ("small.png", (9, 5))):
        make_image(folder / name, size, seed=len(name))
    make_video(folder / "clip.mp4", 50)
    make_video(folder / "uneven.mp4", 30, pts=[k * 40 + k * k * 5 for k in range(30)])
    make_pdf(folder / "report.pdf", 3)
    picture, tall = ({"type": "image", "image": name} for name in ("wide.png", "tall.jpg"))
    part = {"type": "video", "video": "clip.mp4", "video_start": 1.05, "video_end": 3.2, "nframes": 6}
    answer = turn("assistant", "Yes <|im_end|>, <image-2> \n of it.")
    return [
        {"messages": [turn("user", "  Only <img>text</img>\n"), answer]},
        {"messages": [turn("system", "Be brief."), turn("user", picture, "\nWhat?"), answer]},
        {"messages": [turn("user", "a", picture, "b\n", tall, "c"), answer, turn("user", "And?"), answer]},
        {"messages": [turn("user", part, "What happens?"), answer]},
        {"messages": [turn("user", {"type": "video", "video": "uneven.mp4", "nframes": 8}, tall), answer]},
        {
            "conversations": [
                {"from": "human", "value": "<image-2> is not <image-1>. <document> Why?"},
                {"from": "gpt", "value": "So."},
            ],
            "images": ["small.png", "wide.png"],
            "documents": ["report.pdf"],
        },
    ]


@pytest.fixture(scope="module", params=["hf", "train"])
def store(request, exported, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    sampling = {"tile_size": TILE, "max_tiles": 6}
    settings = {"template": request.param, "patch_size": 16, "sampling": sampling}
    path = make_store(folder, exported, records(folder), (900,), **settings)
    write_packs(path, 900, 0)
    assert len(SampleStore(path)) == 6, (path / "dropped.jsonl").read_text()
    return path


def test_rows_are_told_back(store):
    rows = SampleStore(store)
    template = Template(load_tokenizer(store / "tokenizer"), rows.manifest.template, 4)
    told = [tell_back(rows[i], template) for i in range(len(rows))]
    assert told[0].sample.turns[0].parts == ("Only <img>text</img>",)
    assert [one.own_system for one in told] == [False, True, False, False, False, False]
    said = told[5].messages([])[0]["content"][0]["text"]
    assert said == "<image-2> is not <image-1>. <image-3><image-4><image-5> Why?"
    other = {"hf": "train", "train": "hf"}[template.variant]
    with pytest.raises(UntoldError):  # labels of another variant
        tell_back(rows[3], Template(template.tokenizer, other, 4))


def test_a_store_is_green(store, exported, checkpoint, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "hf")
    found = certify(CertifySettings(folder, checkpoint, store=store, samples=6))
    assert {result.name: result.first for result in found.results if result.first} == {}
    own = [result for result in found.results if result.name.startswith("data.jsonl:")]
    assert len(own) == 7, "six and one with far positions"
    assert found.green and all(result.apart for result in own)
    named = [said for said in found.content["by_design"] if said.startswith(("template", "default system"))]
    assert len(named) == (2 if SampleStore(store).manifest.template == "train" else 0)


def test_odd_frames_are_named(exported, tmp_path):
    make_video(tmp_path / "v.mp4", 50)
    asked = turn("user", {"type": "video", "video": "v.mp4", "nframes": 7}, "What?")
    sampling = {"tile_size": TILE, "max_tiles": 6}
    messages = [{"messages": [asked, turn("assistant", "No.")]}]
    path = make_store(tmp_path, exported, messages, (300,), patch_size=16, sampling=sampling)
    write_packs(path, 300, 0)
    (one,) = AskedOfStore(path, CUTTING, 4).read(3)
    assert one.refused == "a video of 7 frames: an export shows an even number" and one.training.ids


def refused(*options) -> str:
    with pytest.raises(UserError) as error:
        convert.main(["certify", *map(str, options)])
    return str(error.value)


@pytest.mark.parametrize("store", ["hf"], indirect=True)
def test_bad_input(store, exported, tmp_path):
    assert "no such folder" in refused("--hf", tmp_path / "none")
    assert "--samples 0" in refused("--hf", exported, "--samples", 0)
    assert "cannot be reached" in refused("--hf", exported, "--endpoint", "http://127.0.0.1:9")
    assert "no token store" in refused("--hf", exported, "--store", tmp_path)
    other = shutil.copytree(store, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"tile_size": 448}))
    said = refused("--hf", exported, "--store", other)
    assert re.search(r"its tile size is 448, that of the export 64; name a store of this model", said)
    (other / "manifest.json").write_text(json.dumps(manifest))
    (other / "900" / "packs.arrow").unlink()
    assert "pack" in refused("--hf", exported, "--store", other)
    older = shutil.copytree(exported, tmp_path / "older")
    code = older / "image_processing_eagle2_5_vl.py"
    code.write_text(code.read_text().replace("def grid(", "def _grid(").replace("self.grid(", "self._grid("))
    assert "older than `certify`: export the model again" in refused("--hf", older)
