"""What docs/language-models.md shows, as somebody follows it: a published language model becomes an Eagle."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from tests.convert.hf_folder import train_tokenizer
from tests.convert.media import write_picture
from tests.paths import REPO

pytestmark = pytest.mark.slow
# Smaller than on the page, by nothing but these.
SMALLER = {
    "--tile-size 448": "--tile-size 56",
    "--output D ": "--output D --tile-size 56 ",
    "32768": "512",
    "train_iterations: 1000": "train_iterations: 3",
    "global_batch_size: 64": "global_batch_size: 2",
}
BODY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 40_960,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def steps() -> dict[str, str]:
    """The page's first programs, by their first line."""
    page = (REPO / "docs" / "language-models.md").read_text(encoding="utf-8")
    page = page.split("## From a published language model to an Eagle")[1].split("\n## ")[0]
    for large, small in SMALLER.items():
        assert large in page
        page = page.replace(large, small)
    return {block.split("\n")[0]: block for block in re.findall(r"```\w+\n(.*?)```", page, re.DOTALL)}


def write_published(folder: Path, model_type: str) -> None:
    """A small language model with its tokenizer, and an encoder, as they are downloaded."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
    )
    fast.add_tokens([AddedToken(name, special=False) for name in ("<think>", "</think>")])
    fast.save_pretrained(folder / "Qwen3-8B")
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **BODY, **(EXPERTS if model_type == "qwen3_moe" else {}))
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / "Qwen3-8B")
    vision = {**ENCODER, "image_size": 56, "patch_size": 14}
    encoder = SiglipModel(SiglipConfig(text_config={**ENCODER, "vocab_size": 99}, vision_config=vision))
    encoder.bfloat16().save_pretrained(folder / "siglip2-so400m-patch14-384")


def write_data(folder: Path) -> None:
    (folder / "media").mkdir()
    turns = ("human", "<image>\nWhat is in the picture?"), ("gpt", "A cat.")
    conversation = [{"from": who, "value": text} for who, text in turns]
    rows = []
    for number in range(8):
        write_picture(folder / "media" / f"{number}.png", 60 + number, 90)
        rows.append({"image": f"{number}.png", "conversations": conversation})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text("captions: {annotation: captions.jsonl, root: media}\n")


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe"])
def test_the_page_as_it_stands(model_type, tmp_path):
    write_published(tmp_path, model_type)
    write_data(tmp_path)
    shown = steps()
    tokens, commands = shown.pop("# 1. its tokenizer, with the image tokens"), []
    (tmp_path / "run.yaml").write_text(
        shown.pop("# run.yaml: no model section, for the model is that of checkpoint.load")
    )
    for block in shown.values():
        commands.append(block.replace("megatron-eagle", f"{sys.executable} -W ignore -m megatron_eagle"))
    generate = f"{sys.executable} -W ignore -m megatron_eagle generate --hf H --image media/1.png"
    (tmp_path / "tokens.py").write_text(tokens)
    script = "\n".join(
        [
            "set -e",
            f"{sys.executable} tokens.py",
            *commands,
            f"{generate} --prompt 'What is it?' --max-new-tokens 4",
        ]
    )
    environment = os.environ | {"PYTHONPATH": f"{REPO}:{REPO / 'kernels'}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    text = json.loads((tmp_path / "H" / "config.json").read_text())["text_config"]
    assert text["model_type"] == model_type
    assert (
        tmp_path / "checkpoints" / "stage1" / "latest_checkpointed_iteration.txt"
    ).read_text().strip() == "3"
