"""Thoughts before answers: training learns what an export's prompt asks for, and nothing of the prompt."""

import json
from pathlib import Path

import pytest

from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.data.text.tokenizer import load_tokenizer
from megatron_eagle.hf_model.prompt import END_THINK, NO_THOUGHTS, THINK, chat_template
from tests.data.helpers import make_store

pytest.importorskip("transformers")

THOUGHTS = f"{THINK}\nIt has whiskers.\n{END_THINK}\n\nA cat."
TURNS = ["What is it?", "A cat.", "Sure?", THOUGHTS, "And this?", "A cup."]


@pytest.fixture(scope="module", params=[False, True], ids=["added", "special"])
def thinking(request, tokenizer_dir, tmp_path_factory) -> Path:
    """A tokenizer with the tokens around thoughts; Qwen3's are added ones that are not special. Special ones
    cannot be written in a text: what somebody wrote is then no thoughts."""
    definition = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    rows = load_tokenizer(tokenizer_dir).vocab_size
    for number, name in enumerate((THINK, END_THINK)):
        like = definition["added_tokens"][0]
        token = like | {"id": rows + number, "content": name, "special": request.param}
        definition["added_tokens"].append(token)
    folder = tmp_path_factory.mktemp("thinking")
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


def processor(folder: Path):
    from transformers import PreTrainedTokenizerFast

    from megatron_eagle.hf_model.image_processing_eagle2_5_vl import Eagle2_5_VLImageProcessor
    from megatron_eagle.hf_model.processing_eagle2_5_vl import Eagle2_5_VLProcessor

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    images = Eagle2_5_VLImageProcessor(size={"height": 28, "width": 28})
    return Eagle2_5_VLProcessor(images, tokenizer, tokens_per_tile=1)


def messages(turns: list[str]) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def test_every_answer_follows_the_prompt_that_asks_for_it(thinking, tmp_path):
    store = make_store(tmp_path, thinking, [{"messages": messages(TURNS)}], (600,), template="hf")
    sample, asks, tokenizer = SampleStore(store)[0], processor(thinking), load_tokenizer(thinking)
    writable = not tokenizer.is_special(tokenizer.token_id(THINK))
    for number in (1, 2, 3):
        said = TURNS[2 * number - 1]
        before = messages(TURNS[: 2 * number - 1])
        # Who asks for thoughts leaves it to the model to begin them.
        thoughts = said == THOUGHTS and writable
        text = asks.apply_chat_template(before, add_generation_prompt=True, enable_thinking=thoughts)
        prompt = asks(text=[text], return_tensors="pt")["input_ids"][0].tolist()
        assert sample.ids[: len(prompt)].tolist() == prompt
        assert text.endswith("assistant\n" if thoughts else NO_THOUGHTS)
        learned = sample.ids[sample.answers == number].tolist()
        assert sample.answers.tolist().index(number) == len(prompt)
        assert tokenizer.decode(learned) == f"{said}<|im_end|>"
    whole = asks(text=[asks.apply_chat_template(messages(TURNS))], return_tensors="pt")
    assert whole["input_ids"][0].tolist() == sample.ids.tolist()


def test_a_user_who_writes_the_tokens_does_not_think(thinking, tmp_path):
    typed = [f"Say {THINK}", "No."]
    store = make_store(tmp_path, thinking, [{"messages": messages(typed)}], (600,), template="hf")
    asks, sample = processor(thinking), SampleStore(store)[0]
    whole = asks(text=[asks.apply_chat_template(messages(typed))], return_tensors="pt")
    assert whole["input_ids"][0].tolist() == sample.ids.tolist()


def test_others_are_told_nothing_of_thoughts(tokenizer_dir, tmp_path):
    asks = processor(tokenizer_dir)
    assert asks.chat_template == chat_template(thinks=False)
    assert THINK not in asks.apply_chat_template(messages(TURNS[:2]), add_generation_prompt=True)
