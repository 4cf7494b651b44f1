"""`convert certify`: green for what training made, and red at the first stage that was changed."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_eagle.certify.certifying import CertifySettings, certify
from megatron_eagle.certify.report import report
from megatron_eagle.commands import convert
from megatron_eagle.hf_model.vllm_plugin.certificate import certificate_line
from tests.convert.hf_folder import rewrite_weights


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    """An export to certify and to change."""
    return Path(shutil.copytree(exported, tmp_path / "hf"))


def changed(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def certificate(folder: Path, **settings):
    return certify(CertifySettings(folder, **settings))


def test_green(copy, checkpoint, capsys):
    assert convert.main(["certify", "--hf", str(copy), "--checkpoint", str(checkpoint)]) == 0
    said = capsys.readouterr().out
    assert said.rstrip().endswith("GREEN: no difference") and "differs by design" in said
    content = json.loads((copy / "certificate.json").read_text())
    assert content["green"] and content["first_difference"] is None
    assert {"model.safetensors", "preprocessor_config.json", "clips.py"} <= content["files"].keys()
    samples = {sample["name"]: sample for sample in content["samples"]}
    assert {
        "made: typed tokens",
        "made: odd pictures",
        "made: page",
        "made: clip and picture",
    } <= samples.keys()
    for sample in samples.values():
        assert sample["hashes"]["training"] == sample["hashes"]["processor"]
        assert 0 < sample["apart"]["transformers: logits"] < 1e-5
    assert max(sample["positions"][1] for sample in samples.values()) > 32_768
    assert "is green" in (copy / "README.md").read_text() and "is green" in certificate_line(copy)
    # Other files, another certificate.
    (copy / "generation_config.json").write_text("{}")
    assert "is of other files (generation_config.json changed since)" in certificate_line(copy)


def test_another_normalisation(copy, checkpoint):
    changed(copy / "preprocessor_config.json", '"image_mean": [\n    0.5,', '"image_mean": [\n    0.48,')
    found = certificate(copy)
    assert not found.green
    firsts = {result.name: str(result.first) for result in found.results}
    assert firsts["made: typed tokens"] == "None", "it has no pixels"
    assert firsts["made: odd pictures"] == "processor: pixels (picture 1: tiles of other values)"
    assert firsts["made: video"].startswith("processor: pixels (video 1")
    assert "RED: made: odd pictures: processor: pixels" in report(found)


def test_another_template(copy):
    changed(copy / "chat_template.jinja", "You are a helpful assistant.", "You are an assistant.")
    found = certificate(copy)
    assert {str(result.first).partition(" (")[0] for result in found.results} == {"None", "processor: ids"}
    assert [r.name for r in found.results if not r.first] == ["made: several turns"], "it has a system's turn"


def test_another_weight(copy, checkpoint):
    name = "language_model.model.norm.weight"
    rewrite_weights(copy, lambda tensors: tensors | {name: tensors[name] * 1.01})
    found = certificate(copy, checkpoint=checkpoint)
    assert {str(result.first).partition(" (")[0] for result in found.results} == {"transformers: logits"}
    assert certificate(copy).green, "without the checkpoint nobody knows"


def test_another_choice_of_frames(copy):
    changed(copy / "clips.py", "np.linspace(first, last, n)", "np.linspace(first, last - 1, n)")
    found = {r.name: str(r.first).partition(" (")[0] for r in certificate(copy).results}
    assert found["made: video"] == found["made: clip and picture"] == "processor: frames"
    assert found["made: page"] == "None"
