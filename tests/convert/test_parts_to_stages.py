"""From parts through all stages, as docs/conversion.md has it: `check` of the published file, and what comes
out of a run on packs that are longer than its source's `max_position_embeddings`."""

import json
import os
import runpy
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_eagle.checkpoint import read_model_config
from megatron_eagle.convert.from_parts import import_parts
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.inference.generate import ExportedModel
from megatron_eagle.training.run_config import load_run_config
from megatron_eagle.training.stages import load_stages, train_stages
from tests.convert.media import write_picture
from tests.convert.test_from_parts import write_parts
from tests.data.helpers import conversation, make_store
from tests.paths import REPO

PROGRESSIVE = REPO / "examples" / "eagle2.5-8b" / "progressive.yaml"
SHORT, LONG, SOURCE = 128, 256, 64  # tokens of the stages' packs, and of the source


@pytest.fixture
def tool(monkeypatch, capsys):
    """`tool(NAME, ...)` runs a tool in this process: its status, stdout and stderr."""

    def run(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPO / "tools" / name), run_name="__main__")
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_the_published_stages_accept_a_start_from_parts(tmp_path, tool, monkeypatch):
    """The page's commands, with small parts and little data; lengths and layouts are the file's."""
    monkeypatch.chdir(tmp_path)
    parts = write_parts(tmp_path)
    source = json.loads((parts.language / "config.json").read_text())
    assert source["max_position_embeddings"] == 32768
    start = (
        "--tokenizer",
        parts.tokenizer,
        "--tile-size",
        64,
        "--checkpoint",
        "checkpoints/eagle2.5-8b-start",
    )
    status, out, _ = tool(
        "convert_hf.py", "import", "--language", parts.language, "--vision", parts.vision, *start
    )
    assert status == 0 and "prompts of up to 32,768 tokens" in out
    write_picture(tmp_path / "p.png", 64, 64)
    record = {**conversation("<image>\nWhat?", "A cat."), "image": "p.png"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "recipe.yaml").write_text(f"cats: {{annotation: a.jsonl, root: {tmp_path}}}")
    lengths: dict[str, list[int]] = {}
    for stage in yaml.safe_load(PROGRESSIVE.read_text())["stages"].values():
        data = lengths.setdefault(stage["data"]["path"], [])
        data += [stage["data"]["length"]] * (stage["data"]["length"] not in data)
    for data, tokens in lengths.items():
        made = ("--recipe", "recipe.yaml", "--tokenizer", parts.tokenizer, "--output", data)
        tiles = ("--tile-size", 64, "--patch-size", 16, "--template", "train")
        assert tool("preprocess_data.py", "run", *made, "--max-tokens", *tokens, *tiles)[0] == 0
        for length in tokens:
            assert tool("pack_data.py", "--data", data, "--length", length)[0] == 0
    status, out, err = tool("train.py", "check", "--processes", 64, "--config", PROGRESSIVE)
    assert status == 0, err
    runs = [line for line in out.splitlines() if "iterations of" in line]
    assert [line.split(":")[0].rsplit("/")[-1] for line in runs] == [
        "stage1",
        "stage1_5",
        "stage2_32k",
        "stage3_64k",
        "stage4_128k",
    ]
    raised = "model.text.max_position_embeddings is raised from"
    assert [line for line in out.splitlines() if line not in runs] == [
        f"runs/eagle2.5-8b/stage3_64k: {raised} 32,768 to 65,536, the tokens of this run's packs",
        f"runs/eagle2.5-8b/stage4_128k: {raised} 65,536 to 131,072, the tokens of this run's packs",
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two stages of one step each, on packs of 128 and 256 tokens, from parts that are made for 64."""
    folder = tmp_path_factory.mktemp("trained")
    parts = write_parts(folder)
    config = parts.language / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": SOURCE}))
    import_parts(replace(parts, tile_size=64), folder / "start")
    assert read_model_config(folder / "start").text.max_position_embeddings == SOURCE
    records = [conversation("Hi", "Yes " * (k % 5 + 1)) for k in range(30)]
    settings = {"sampling": {"tile_size": 64}, "patch_size": 16}
    store = make_store(folder, parts.tokenizer, records, (SHORT, LONG), **settings)
    for length in (SHORT, LONG):
        write_packs(store, length, seed=0)
    training = {"train_iterations": 1, "global_batch_size": 1, "precision": "fp32"}
    stages = {
        name: {"data": {"path": str(store), "length": length}, "training": training}
        for name, length in (("short", SHORT), ("long", LONG))
    }
    sections = {
        "checkpoint": {"path": str(folder / "run"), "load": str(folder / "start")},
        "logging": {"progress": False, "tensorboard": False},
        "stages": stages,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))
    train_stages(load_stages(folder / "run.yaml"))
    for name in stages:
        export_hf(folder / "run" / name, folder / f"hf-{name}")
    return folder


def test_checkpoints_and_exports_have_the_longest_pack(trained):
    for name, length in (("short", SHORT), ("long", LONG)):
        (saved,) = (trained / "run" / name).glob("iter_*/run.yaml")
        assert yaml.safe_load(saved.read_text())["model"]["text"]["max_position_embeddings"] == length
        written = json.loads((trained / f"hf-{name}" / "config.json").read_text())
        assert written["text_config"]["max_position_embeddings"] == length


def test_a_shorter_run_from_there_keeps_it(trained, tmp_path, tool):
    """And the planner has it from the checkpoint."""
    values = yaml.safe_load((trained / "run.yaml").read_text())
    values |= values.pop("stages")["short"]
    values["checkpoint"] = {"path": str(tmp_path / "next"), "load": str(trained / "run" / "long")}
    (tmp_path / "next.yaml").write_text(yaml.safe_dump(values))
    config = load_run_config(tmp_path / "next.yaml", world_size=1)
    assert (config.model.text.max_position_embeddings, config.notes) == (LONG, [])
    status, out, _ = tool("plan.py", "--config", tmp_path / "next.yaml", "--gpus", 1, "--gpu", "l4")
    assert status == 0 and f"positions: max_position_embeddings {LONG}\n" in out


def test_longer_prompts_only_where_they_are_allowed(trained, tool):
    long = trained / "hf-long"
    assert ExportedModel(long).max_positions == LONG

    def ask(folder, prompt, *options):
        return tool("generate.py", "--hf", folder, "--prompt", prompt, "--max-new-tokens", 3, *options)

    within, beyond = "a " * (SHORT - 20), "a " * (LONG + 20)
    assert ask(trained / "hf-short", within * 2)[0] == 2
    status, _, err = ask(long, within)
    assert status == 0 and not err
    status, _, err = ask(long, beyond)
    assert status == 2 and err.count("\n") == 1
    assert f"tokens and the model was trained for {LONG} (max_position_embeddings)" in err
    assert "--allow-long-prompts" in err
    status, _, err = ask(long, beyond, "--allow-long-prompts")
    assert status == 0 and err.startswith("warning: a prompt of ") and f"beyond the {LONG} that" in err
    assert ask(long, within, "--allow-long-prompts")[2] == ""
    status, _, err = tool(
        "generate.py", "--endpoint", "http://127.0.0.1:9", "--prompt", "a", "--allow-long-prompts"
    )
    assert status == 2 and "the server's own setting" in err


def test_a_question_that_is_too_long_is_named_by_an_evaluation(trained, tmp_path, tool):
    question = {"id": "1", "question": "a " * (LONG + 20), "answer": "b", "metric": "exact"}
    (tmp_path / "b.jsonl").write_text(json.dumps(question) + "\n")
    asked = ("run", "--hf", trained / "hf-long", "--benchmark", tmp_path / "b.jsonl", "--max-new-tokens", 2)
    status, _, err = tool("evaluate.py", *asked, "--output", tmp_path / "o")
    assert status == 2 and "no question was answered; the first problem: the prompt has" in err
    assert tool("evaluate.py", *asked, "--output", tmp_path / "o", "--allow-long-prompts")[0] == 0


def test_vllm_is_started_for_so_many_tokens(trained, tmp_path):
    (tmp_path / "vllm").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "vllm").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def start(*arguments, **variables):
        command = ["bash", str(REPO / "tools" / "serve_vllm.sh"), str(trained / "hf-long"), *arguments]
        done = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines(), done.stderr

    assert start("--seed", "1")[1][-4:] == ["--max-model-len", str(LONG), "--seed", "1"]
    status, arguments, _ = start("--max-model-len=100")
    assert status == 0 and [a for a in arguments if "max-model-len" in a] == ["--max-model-len=100"]
    for asked in (("--max-model-len", "257"), ("--max-model-len=1k",), ("--max_model_len", "1K")):
        status, _, err = start(*asked)
        assert (
            status == 2
            and err.count("\n") == 1
            and f"beyond the {LONG} tokens that the model was trained" in err
        )
        status, arguments, err = start(*asked, VLLM_ALLOW_LONG_MAX_MODEL_LEN="1")
        assert status == 0 and err.startswith("warning: ") and arguments[-len(asked) :] == list(asked)
