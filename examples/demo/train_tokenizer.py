"""Trains the demo's small byte-level BPE on the demo's own text, because the demo reaches no model hub.

The folder it writes is laid out like a Qwen2 tokenizer (same text splitting, same special tokens, Eagle's
image tokens added last) and loads with `tokenizers` and with transformers' `AutoTokenizer`.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
EAGLE_TOKENS = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<interval>",
    "</interval>",
)
# Qwen2's pre-tokenizer: contractions, words with their leading space, single digits, punctuation, blanks.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What the chat template writes around the conversations; repeated so that its words become single tokens.
_TEMPLATE_TEXT = [
    "system\nYou are a helpful assistant.",
    "user\n<image 1><image 2>",
    "assistant\n",
    "The first video sampled with 2.00 fps: Frame 1 sample at 0.50s: Frame 2 sample at 1.00s: ",
] * 8


def train_tokenizer(texts: list[str], folder: Path, *, vocab_size: int = 500) -> int:
    """Train on `texts`, write the tokenizer to `folder`, return its number of rows (special tokens included).

    `vocab_size` counts the rows; the result has fewer where the text offers no more merges. Training is
    deterministic: the same texts give the same files.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, START, END, *EAGLE_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *_TEMPLATE_TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _config(tokenizer, special))
    _write_json(
        folder / "special_tokens_map.json",
        {"eos_token": END, "pad_token": PAD, "additional_special_tokens": [START, *EAGLE_TOKENS]},
    )
    return tokenizer.get_vocab_size()


def _config(tokenizer: Tokenizer, special: list[str]) -> dict:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(tokenizer.token_to_id(t)): {"content": t, **flags} for t in special},
        "additional_special_tokens": [START, *EAGLE_TOKENS],
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
