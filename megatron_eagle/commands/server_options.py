"""The option of commands that ask a server: how long they wait for it."""

import math
from argparse import ArgumentParser, ArgumentTypeError


def add_timeout(parser: ArgumentParser) -> None:
    """`--timeout`; None: what `ServedModel` takes by the server's length."""
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="without a byte from the server (default: 600; more for more than 32,768 tokens)",
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"{text} is no positive number of seconds")
    return value
