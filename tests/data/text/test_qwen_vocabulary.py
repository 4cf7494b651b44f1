"""With the real vocabulary of Qwen2.5: the ids that transformers' own tokenizer gives."""

import json

import numpy as np
import pytest

from megatron_eagle.data.annotations.formats import read_sample
from megatron_eagle.data.text.template import Template
from megatron_eagle.data.text.tokenizer import HuggingFaceTokenizer
from tests.data.text import qwen

FILE = qwen.ranks_file()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FILE is None, reason="no ranks: pip install --no-deps dashscope"),
]

TRICKY = [
    "",
    " ",
    "\n\n  \n",
    "a  b   c\t\td \n e",
    "I'M you'Ll WE'VE it's 'tis",
    "1234567890 3.14 1,000,000 ²³ ½ ٣٤ 一二三",
    "naïve café e\u0301 Å ﬁ Ω",  # NFC joins, and keeps the ligature
    "日本語とEnglishを混ぜる。中文，標點！",
    "한국어 텍스트 العربية עברית हिन्दी ไทย",
    "👩‍👩‍👧‍👦🇩🇪👍🏽 \u200b\u00a0\ufeff",
    "def f(x):\n\treturn x**2  # comment\r\n\r\n",
    "<|im_end|> <img> </img> <IMG_CONTEXT> <tool_call> <|fim_pad|>",
    "https://example.com/a?b=c&d=%20#e",
    "x" * 500,
    " " * 77 + "!" * 33 + "\n" * 12,
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Ours, and transformers' Qwen2Tokenizer of the same vocabulary with Qwen's own tokens alone."""
    from transformers import Qwen2Tokenizer

    vocabulary, merges = qwen.vocabulary_and_merges(qwen.read_ranks(FILE))
    folder = tmp_path_factory.mktemp("qwen")
    qwen.write_qwen_tokenizer(folder, vocabulary, merges)
    theirs = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    theirs.add_tokens(qwen.QWEN, special_tokens=True)
    theirs.add_tokens(qwen.PLAIN)
    theirs.add_tokens(qwen.EAGLE, special_tokens=True)
    return HuggingFaceTokenizer(folder), theirs


def test_the_published_numbers(pair):
    ours, _ = pair
    assert ours.vocab_size == 151_676
    found = {name: ours.token_id(name) for name in ("<|endoftext|>", "<|im_end|>", "<img>", "</img>")}
    assert found == {"<|endoftext|>": 151_643, "<|im_end|>": 151_645, "<img>": 151_665, "</img>": 151_666}
    assert ours.token_id("<IMG_CONTEXT>") == 151_667


def test_tricky_text(pair):
    ours, theirs = pair
    for text in TRICKY:
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == expected, text
    spelled = theirs("<|im_end|>", add_special_tokens=False)["input_ids"]
    assert spelled == [151_645] and ours.encode("<|im_end|>") != spelled  # what a user types stays text


def test_any_text(pair):
    ours, theirs = pair
    rng = np.random.default_rng(0)
    planes = [
        (0x20, 0x7F),
        (0xA0, 0x250),
        (0x370, 0x600),
        (0x900, 0xE80),
        (0x3040, 0x9FFF),
        (0x1F300, 0x1FAFF),
    ]
    for _ in range(300):
        letters = list(rng.choice(list(" \n\t'."), rng.integers(1, 60)))
        for place in np.flatnonzero(rng.random(len(letters)) < 0.8):
            letters[place] = chr(rng.integers(*planes[rng.integers(len(planes))]))
        text = "".join(letters)
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], repr(text)


@pytest.mark.parametrize("variant", ["train", "hf"])
def test_a_conversation(pair, variant):
    """The template writes piece by piece what transformers cuts out of one string."""
    ours, theirs = pair
    template = Template(ours, variant, tokens_per_tile=4)
    turns = [{"from": "human", "value": "<image>\n" + TRICKY[7]}, {"from": "gpt", "value": TRICKY[3]}]
    turns += [{"from": "human", "value": TRICKY[9]}, {"from": "gpt", "value": TRICKY[10]}]
    raw = json.dumps({"image": "a.png", "conversations": turns}).encode()
    sample = read_sample(raw, root="", file="a.jsonl", line=1)
    expected = theirs(template.text(sample, [2], []), add_special_tokens=False)["input_ids"]
    assert template.encode(sample, [2], []).ids.tolist() == expected
