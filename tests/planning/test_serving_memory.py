"""What a served prompt takes, by formula; vLLM's own count of its cache is compared in tests/serving."""

import json

import pytest

from megatron_eagle.commands import plan
from megatron_eagle.errors import UserError
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.planning.serving_memory import ServedPrompt, serving_memory
from tests.convert.hf_folder import read_weights


def run(capsys, *arguments):
    plan.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_weights_are_those_of_the_export(exported):
    eagle = EagleConfig.from_hf(json.loads((exported / "config.json").read_text()))
    served = {name: tensor for name, tensor in read_weights(exported).items() if ".head." not in name}
    found = serving_memory(eagle, ServedPrompt(64, 2, 2, 96, 64, kv_bytes=1))
    assert found.weights == 2 * sum(tensor.numel() for tensor in served.values())
    text = eagle.text
    assert found.kv_token == 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    assert found.kv == 64 * found.kv_token
    assert found.features == 2 * 2 * eagle.tokens_per_tile * text.hidden_size
    assert (found.frames, found.pixels) == (2 * 96 * 64 * 3, 2 * 3 * eagle.vision.image_size**2 * 4)


def test_512_frames_of_the_8b(capsys, tmp_path):
    common = ("--preset", "eagle2.5-8b", "--frames", 512)
    said = run(capsys, "--serve", 143360, *common, "--gpu", "h200", "--json", tmp_path / "plan.json")
    assert "57,344 bytes a token" in said and "does not hold" not in said and "H200" in said
    found = json.loads((tmp_path / "plan.json").read_text())
    prompt, found = found["prompt"], found["bytes"]
    assert found["kv"] == 143360 * 57344 and prompt["frames"] == 512
    assert found["gpu"] == found["weights"] + found["kv"] + found["features"]
    assert "it does not hold them" in run(capsys, "--serve", 139264, *common)  # its labels
    half = run(capsys, "--serve", 143360, *common, "--kv-bytes", 1)
    assert "28,672 bytes a token" in half


def test_what_cannot_be_planned(exported, tmp_path):
    for arguments, message in (
        (("--hf", exported, "--gpus", 8, "--gpu", "h200"), "--hf is for --serve"),
        (("--preset", "eagle2.5-8b"), "--gpus and --gpu"),
        (("--serve", 0, "--hf", exported), "--serve is 0: too small"),
        (("--serve", 64, "--hf", exported, "--frame-size", "wide"), "expected WIDTHxHEIGHT"),
        (("--serve", 64, "--hf", tmp_path), "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            plan.main([str(argument) for argument in arguments])
