"""Qwen2.5's tokenizer with Eagle's tokens, built from the ranks that the package `dashscope` carries.

The ranks are tiktoken's: a token's bytes and its number. A byte-pair encoder wants merges instead: a token is
merged last from the two parts into which the ranks below its own encode it.
"""

import base64
import importlib.util
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PAIRS = ("object_ref", "box", "quad", "vision")
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN += [f"<|{name}_{end}|>" for name in _PAIRS for end in ("start", "end")]
QWEN += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
PLAIN = ["<tool_call>", "</tool_call>"]
PLAIN += [
    f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
]
EAGLE = ["<img>", "</img>", "<IMG_CONTEXT>"]
EAGLE += [f"<{slash}{name}>" for name in ("quad", "ref", "box", "interval") for slash in ("", "/")]


def ranks_file() -> Path | None:
    """None where `dashscope` is not installed."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"


def read_ranks(file: Path) -> dict[bytes, int]:
    pairs = (line.split() for line in file.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def vocabulary_and_merges(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    letters = _letters()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            left, right = _parts(token, rank, ranks)
            merges.append((written(left), written(right)))
    return {written(token): rank for token, rank in ranks.items()}, merges


def _letters() -> dict[int, str]:
    """The letter that byte-level encoders write for each byte (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def _parts(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """What is left of a token when all merges before its own are made."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        assert pairs[best] < rank, token
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def write_qwen_tokenizer(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """`tokenizer.json` as Qwen2.5 publishes it, with Eagle's tokens behind its own."""
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_PATTERN), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in QWEN])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in EAGLE])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
