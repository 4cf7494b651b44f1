"""Prompts and the tokens that a model was trained for: more of them only where a user asks for that."""

import sys
from argparse import ArgumentParser, Namespace

from megatron_eagle.errors import UserError

_OPTION = "--allow-long-prompts"


def add_option(parser: ArgumentParser) -> None:
    """The tools' option for it: `allow_long_prompts`."""
    parser.add_argument(
        _OPTION,
        action="store_true",
        help="also beyond the model's max_position_embeddings, where it was never trained (with a warning)",
    )


def check_option(options: Namespace) -> None:
    """Refuse the option where it has no effect.

    Raises:
        UserError: a server answers (`endpoint`).
    """
    if options.allow_long_prompts and options.endpoint is not None:
        raise UserError(f"{_OPTION}: how long prompts may be is the server's own setting")


def new_tokens(prompt: int, asked: int, limit: int, *, allow: bool) -> int:
    """How many of `asked` new tokens a prompt of `prompt` tokens may get: those that have positions.

    Args:
        limit: the model's `max_position_embeddings`, which training raises to its packs.
        allow: no limit, but a warning on stderr.

    Raises:
        UserError: the prompt alone goes beyond the limit.
    """
    if allow:
        if prompt + asked - 1 > limit:  # the last one is never read
            _warn(f"a prompt of {prompt:,} tokens and up to {asked:,} new ones go", limit)
        return asked
    if prompt > limit:
        raise UserError(
            f"the prompt has {prompt:,} tokens and the model was trained for {limit:,} "
            f"(max_position_embeddings): show less, as with fewer frames or tiles, or give {_OPTION}"
        )
    return min(asked, limit - prompt + 1)


def warn_of_lowered(limit: int) -> None:
    """Say that prompts show fewer frames or tiles than they may, as many as fit into `limit` tokens."""
    text = f"as many as fit into {limit:,} tokens with the answer, here and in prompts to come"
    print(f"note: fewer frames or tiles than asked for: {text}; {_OPTION} shows all", file=sys.stderr)


def warn_of_server(served: int | None, trained: int) -> None:
    """Warn of a server that takes prompts of up to `served` tokens (None: unknown) beyond the `trained`."""
    if served is not None and served > trained:
        _warn(f"prompts of up to {served:,} tokens, which the server takes, go", trained)


def _warn(what: str, limit: int) -> None:
    text = f"{what} beyond the {limit:,} that the model was trained for (max_position_embeddings)"
    print(f"warning: {text}: answers may be worse", file=sys.stderr)
