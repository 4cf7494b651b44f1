"""Reading of Hugging Face configurations: what may be left out, and what is refused by its name."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from megatron_eagle.errors import UserError

# What a configuration may leave out, because transformers has the default that our dataclasses have.
_OPTIONAL = (
    "layer_norm_eps",
    "num_channels",
    "rope_theta",
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
)


def known_fields(cls: type[Any], values: Mapping[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of the dataclass `cls` among `values`, but for those of another form.

    Raises:
        KeyError: one that has no default in transformers is missing.
    """
    names = [f.name for f in fields(cls) if f.name not in without]
    return {name: values[name] for name in names if name in values or name not in _OPTIONAL}


def require(hf: Mapping[str, Any], **expected: object) -> None:
    """Refuse what this implementation does not have; a key that is left out has the expected value."""
    for name, value in expected.items():
        if hf.get(name, value) != value:
            raise UserError(f"config.json: {name} is {hf[name]!r}; only {value!r} is supported")


@contextmanager
def missing_keys_named() -> Iterator[None]:
    """Turns a missing key into a line.

    Raises:
        UserError: naming it.
    """
    try:
        yield
    except KeyError as error:
        raise UserError(f"config.json: {error.args[0]} is missing") from None
