"""Tiny Hugging Face folders for the tests: a tokenizer and a model with random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_eagle.convert.shards import DTYPES, plan_shards, write_shards
from megatron_eagle.hf_model.configuration_eagle2_5_vl import Eagle2_5_VLConfig
from megatron_eagle.hf_model.modeling_eagle2_5_vl import Eagle2_5_VLForConditionalGeneration
from tests.data.helpers import SPECIAL

TEXT = [
    "system user assistant You are a helpful assistant.",
    "The first video sampled with 2.00 fps: Frame 1 sample at 0.50s: <image 1>",
    "What is in the picture? A cat, a rocket, a cup of coffee. Describe the clip, please!",
]
TILE = 64
TOKENS_PER_TILE = 4
SPARE_ROWS = 3  # vocabulary rows beyond the tokenizer's, as in the released model


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer without special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def write_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE tokenizer with the chat and image tokens, as transformers saves it."""
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def write_hf_folder(folder: Path, *, vision: dict | None = None, text: dict | None = None) -> Path:
    """An Eagle 2.5 checkpoint in fp32: grouped queries, pooling head, odd vocabulary, one file."""
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(0)
    config = Eagle2_5_VLConfig(
        vision_config={
            "image_size": TILE,
            "patch_size": 16,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "layer_norm_eps": 3e-6,
            **(vision or {}),
        },
        text_config={
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_theta": 3e6,
            "rms_norm_eps": 2e-6,
            "max_position_embeddings": 4096,
            "vocab_size": tokenizer.get_vocab_size() + SPARE_ROWS,
            **(text or {}),
        },
        image_token_index=tokenizer.token_to_id("<IMG_CONTEXT>"),
        max_dynamic_tiles=6,
        loss_version="of-the-source",
    )
    model = Eagle2_5_VLForConditionalGeneration(config)
    for parameter in model.parameters():  # biases and norms too, so that no mix-up goes unseen
        torch.nn.init.normal_(parameter, mean=0.02, std=0.1)
    model.save_pretrained(folder)
    return folder


def rewrite_weights(folder: Path, change, shard_bytes: int = 10**9) -> None:
    """Replace the weights of a one-file folder by `change(tensors)`, in shards of at most `shard_bytes`."""
    tensors = change(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    write_shards(folder, tensors.items(), plan_shards(sizes, shard_bytes), kinds_of(tensors))


def kinds_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """safetensors types and shapes."""
    names = {dtype: name for name, dtype in DTYPES.items()} | {torch.int64: "I64"}
    return {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, whatever its shards."""
    return {k: v for path in sorted(folder.glob("model*.safetensors")) for k, v in load_file(path).items()}


def assert_same_weights(one: Path, other: Path) -> None:
    """Same files, names, types and bits."""
    files = sorted(path.name for path in one.glob("model*.safetensors"))
    assert files == sorted(path.name for path in other.glob("model*.safetensors"))
    for name in files:
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert tensor.dtype == theirs[key].dtype, key
            assert torch.equal(tensor, theirs[key]), key
