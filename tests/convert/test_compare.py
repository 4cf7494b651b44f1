"""verify and diff: equal models are found equal, every difference is named, the exit status says it."""

import runpy
import shutil

import pytest
import torch

from megatron_eagle.convert.compare import differences, open_tensors
from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.errors import UserError
from tests.convert.hf_folder import rewrite_weights
from tests.convert.media import write_picture, write_video
from tests.paths import REPO

BIAS = "mlp1.1.bias"
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"


def run_tool(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["convert_hf.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(REPO / "tools" / "convert_hf.py"), run_name="__main__")
    return exit.value.code or 0


def _change(tensors):
    """One of every kind."""
    tensors[BIAS] = torch.zeros(3)
    tensors[QUERY] = tensors[QUERY] + 0.25
    tensors["extra"] = torch.zeros(1)
    tensors["mlp1.3.bias"] = torch.full_like(tensors["mlp1.3.bias"], float("nan"))
    del tensors["mlp1.0.bias"]
    return tensors


def test_every_kind_of_difference(source, broken):
    rewrite_weights(broken, _change)
    found = {d.name: d for d in differences(open_tensors(source), open_tensors(broken))}
    assert found.keys() == {BIAS, QUERY, "extra", "mlp1.0.bias", "mlp1.3.bias"}
    assert found[BIAS].what == "shape [48] and [3]" and found[BIAS].max_abs is None
    assert found[QUERY].what == "values" and found[QUERY].max_abs == pytest.approx(0.25)
    assert found["mlp1.3.bias"].max_abs != found["mlp1.3.bias"].max_abs  # NaN
    assert found["extra"].what == "only in the second"
    assert found["mlp1.0.bias"].what == "only in the first"


def test_one_bit_is_a_difference_and_a_type_is_none(source, broken):
    def flip(tensors):
        tensors[QUERY].view(torch.int32)[5, 7] ^= 1
        return tensors

    rewrite_weights(broken, flip)
    [found] = differences(open_tensors(source), open_tensors(broken))
    assert found.name == QUERY and 0 < found.max_abs < 1e-7
    rewrite_weights(broken, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    wider = shutil.copytree(broken, broken.parent / "wider")
    rewrite_weights(wider, lambda tensors: {k: v.float() for k, v in tensors.items()})
    assert not list(differences(open_tensors(broken), open_tensors(wider)))


def test_a_checkpoint_is_its_source(source, checkpoint, exported, monkeypatch, capsys):
    for pair in ((source, checkpoint), (checkpoint, exported)):
        assert run_tool(monkeypatch, "diff", *pair) == 0
        assert capsys.readouterr().out.endswith("tensors are equal bit for bit\n")
    with pytest.raises(UserError, match="no such folder"):
        open_tensors(source / "nowhere")


def test_verify_compares_tensors_and_logits(source, checkpoint, monkeypatch, capsys):
    assert run_tool(monkeypatch, "verify", "--hf", source, "--checkpoint", checkpoint) == 0
    out = capsys.readouterr().out
    assert out.count("ok\n") == 4 and out.endswith("the same model\n") and "NOT" not in out
    assert all(name in out for name in ("text", "two pictures", "video"))


def test_verify_takes_a_users_media(source, checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ("verify", "--hf", source, "--checkpoint", checkpoint)
    media = ("--image", write_picture(tmp_path / "p.png", 90, 70), "--video", write_video(tmp_path / "v.mp4"))
    assert run_tool(monkeypatch, *arguments, *media, "--prompt", "What is it?") == 0
    assert "yours" in capsys.readouterr().out
    assert run_tool(monkeypatch, *arguments, *media) == 2
    assert run_tool(monkeypatch, *arguments, "--image", "nowhere.png", "--prompt", "What?") == 2
    assert "image not found: nowhere.png" in capsys.readouterr().err


def test_verify_notices_one_wrong_tensor(broken, checkpoint, monkeypatch, capsys):
    def swap(tensors):
        tensors[QUERY] = tensors[QUERY].flip(0)
        return tensors

    rewrite_weights(broken, swap)
    assert run_tool(monkeypatch, "verify", "--hf", broken, "--checkpoint", checkpoint) == 1
    out = capsys.readouterr().out
    assert f"{QUERY}: values, largest difference" in out and "DIFFERS" in out
    assert out.endswith("NOT the same model\n")
    tensors_only = ("verify", "--hf", broken, "--checkpoint", checkpoint, "--tensors-only")
    assert run_tool(monkeypatch, *tensors_only) == 1
    assert "logits" not in capsys.readouterr().out


def test_a_checkpoint_with_adapters_is_not_compared_by_mistake(broken, tmp_path):
    import_hf(broken, tmp_path / "c")
    run_file = tmp_path / "c" / "iter_0000000" / "run.yaml"
    run_file.write_text(run_file.read_text() + "lora: {rank: 2}\n")
    with pytest.raises(UserError, match="has LoRA adapters; export it"):
        open_tensors(tmp_path / "c")
