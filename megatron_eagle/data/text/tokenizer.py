"""Tokenizers behind one interface: text that spells a special token stays text, special ids go by name."""

import bisect
import hashlib
import json
import shutil
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as FastTokenizer

from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.prompt import END_OF_TEXT, IM_END, IM_START, IMG_CONTEXT, IMG_END, IMG_START

# Names that a template writes as single tokens, or that the release adds for grounding; in somebody's text
# they are always plain text, even where a tokenizer file forgot to mark them as special.
RESERVED = frozenset(
    (IM_START, IM_END, END_OF_TEXT, IMG_START, IMG_END, IMG_CONTEXT)
    + ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<interval>", "</interval>")
)
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class Tokenizer(Protocol):
    """What the template and the store need to know of a tokenizer."""

    vocab_size: int
    """Rows that an embedding must have: the largest id + 1, without any padding."""
    fingerprint: str
    """SHA-256 of what defines the tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing in it becomes a special token."""

    def encode_split(self, text: str, start: int) -> tuple[list[int], int]:
        """Ids of plain text, and how many of them lie wholly before character `start`."""

    def count(self, text: str) -> int:
        """`len(encode(text))`, remembered for short texts."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens by their names."""

    def token_id(self, name: str) -> int:
        """Id of a special token.

        Raises:
            UserError: there is none; it is named.
        """

    def has_token(self, name: str) -> bool:
        """Whether there is a token of this name."""

    def is_special(self, token: int) -> bool:
        """Whether this id is a special token, which no plain text becomes."""


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` library (Qwen2.5 and alike)."""

    def __init__(self, folder: str | Path):
        self._path = Path(folder) / "tokenizer.json"
        try:
            definition = json.loads(self._path.read_text(encoding="utf-8"))
            for token in definition.get("added_tokens") or []:
                token["special"] |= token["content"] in RESERVED
            self._tokenizer = FastTokenizer.from_str(json.dumps(definition))
        except FileNotFoundError:
            raise UserError(
                f"no tokenizer.json and no tokenizer.model in {folder}; "
                "--tokenizer needs the folder of a saved tokenizer"
            ) from None
        except Exception as error:  # the Rust side raises plain Exception for a file it cannot read
            raise UserError(f"{self._path} is not a tokenizer file: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._special = {token["id"] for token in definition.get("added_tokens") or [] if token["special"]}
        canonical = json.dumps(definition, sort_keys=True, ensure_ascii=False)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        self._count_short = lru_cache(maxsize=16384)(self._count)
        self._count_long = lru_cache(maxsize=64)(self._count)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_split(self, text: str, start: int) -> tuple[list[int], int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, bisect.bisect_right(encoding.offsets, start, key=lambda span: span[1])

    def count(self, text: str) -> int:
        return self._count_short(text) if len(text) < 256 else self._count_long(text)

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_id(self, name: str) -> int:
        token = self._tokenizer.token_to_id(name)
        if token is None:
            raise UserError(f'{self._path} has no token "{name}"; add it as a special token')
        return token

    def has_token(self, name: str) -> bool:
        return self._tokenizer.token_to_id(name) is not None

    def is_special(self, token: int) -> bool:
        return token in self._special


class SentencePieceTokenizer:
    """A `tokenizer.model` of the `sentencepiece` library.

    Special tokens are pieces of the model, or names that an `added_tokens.json` beside it gives ids to.  What
    the model's own normaliser leaves out of a text (line ends, say) is not in the ids either: train with
    `normalization_rule_name="identity"` and `remove_extra_whitespaces=False` to keep everything.
    """

    def __init__(self, folder: str | Path):
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2, sentencepiece_pb2

        # Made by protobuf when they are imported.
        messages: Any = sentencepiece_pb2
        models: Any = sentencepiece_model_pb2

        self._parse = messages.SentencePieceText.FromString
        self._path = Path(folder) / "tokenizer.model"
        added = Path(folder) / "added_tokens.json"
        try:
            model = models.ModelProto.FromString(self._path.read_bytes())
            self._added = json.loads(added.read_text(encoding="utf-8")) if added.is_file() else {}
            # The library finds user-defined pieces in any text; as control pieces they keep their ids, and
            # text that spells them stays text.
            for piece in model.pieces:
                if piece.type == piece.USER_DEFINED and (piece.piece in RESERVED or piece.piece[:2] == "<|"):
                    piece.type = piece.CONTROL
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
            self._names = {int(token): name for name, token in self._added.items()}
        except Exception as error:  # protobuf, JSON and the C++ side have no common type
            raise UserError(f"{self._path} is not a sentencepiece model: {error}") from None
        self.vocab_size = 1 + max([self._processor.vocab_size() - 1, *self._names])
        definition = [hashlib.sha256(self._path.read_bytes()).hexdigest(), sorted(self._added.items())]
        self.fingerprint = hashlib.sha256(json.dumps(definition).encode()).hexdigest()
        self._count_short = lru_cache(maxsize=16384)(self._count)
        self._count_long = lru_cache(maxsize=64)(self._count)

    def encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def encode_split(self, text: str, start: int) -> tuple[list[int], int]:
        serialized = self._processor.encode(text, out_type="serialized_proto")
        pieces = self._parse(serialized).pieces
        end = len(text[:start].encode())  # the library counts bytes
        # Of a character in several byte tokens all but the last have no width, where the character begins.
        before = sum(piece.end < end or piece.begin < piece.end == end for piece in pieces)
        return [piece.id for piece in pieces], before

    def count(self, text: str) -> int:
        return self._count_short(text) if len(text) < 256 else self._count_long(text)

    def _count(self, text: str) -> int:
        return len(self._processor.encode(text))

    def decode(self, ids: list[int]) -> str:
        parts: list[str] = []
        for special, run in groupby(ids, self.is_special):
            tokens = list(run)
            parts += map(self._name, tokens) if special else [self._processor.decode(tokens)]
        return "".join(parts)

    def token_id(self, name: str) -> int:
        if not self.has_token(name):
            raise UserError(f'{self._path} has no token "{name}"; add it as a special token')
        return int(self._added[name]) if name in self._added else self._processor.piece_to_id(name)

    def has_token(self, name: str) -> bool:
        return name in self._added or self._processor.id_to_piece(self._processor.piece_to_id(name)) == name

    def is_special(self, token: int) -> bool:
        return token in self._names or self._processor.is_control(token)

    def _name(self, token: int) -> str:
        return self._names.get(token) or self._processor.id_to_piece(token)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read the tokenizer in a folder: its tokenizer.json, or else its tokenizer.model (sentencepiece).

    Raises:
        UserError: there is none or it cannot be read.
    """
    is_sentencepiece = (Path(folder) / "tokenizer.model").is_file()
    has_json = (Path(folder) / "tokenizer.json").is_file()
    return (
        SentencePieceTokenizer(folder) if is_sentencepiece and not has_json else HuggingFaceTokenizer(folder)
    )


def copy_tokenizer(source: str | Path, target: Path) -> None:
    """Copy the files of a tokenizer, and nothing else that lies beside them, into a new folder `target`."""
    target.mkdir(parents=True)
    for name in _FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, target / name)
