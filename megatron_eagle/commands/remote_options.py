"""The options of commands that read media: from where remote ones may be fetched, and where they are kept."""

import argparse

from megatron_eagle.data.media.remote.settings import RemoteSettings
from megatron_eagle.errors import UserError

_OPTIONS = {
    "hosts": "--remote-host",
    "cache": "--remote-cache",
    "cache_bytes": "--remote-cache-bytes",
    "timeout_s": "--remote-timeout",
    "attempts": "--remote-attempts",
}


def add_remote_options(parser: argparse.ArgumentParser) -> None:
    """Add them to a command."""
    defaults = RemoteSettings()
    add = parser.add_argument_group("remote media (off unless a host is named)").add_argument
    add(
        "--remote-host",
        nargs="+",
        default=[],
        metavar="ADDRESS",
        help="s3://bucket, gs://bucket, hf://datasets/owner/name, https://host: what may be fetched",
    )
    add("--remote-cache", metavar="DIR", help="folder of this machine that keeps what is fetched")
    add(
        "--remote-cache-bytes",
        type=int,
        default=defaults.cache_bytes,
        metavar="N",
        help="bytes that it holds at most; what was not used for longest goes (default %(default)s)",
    )
    add(
        "--remote-timeout",
        type=float,
        default=defaults.timeout_s,
        metavar="SECONDS",
        help="without an answer, until a try has failed (default %(default)s)",
    )
    add(
        "--remote-attempts",
        type=int,
        default=defaults.attempts,
        metavar="N",
        help="tries (default %(default)s)",
    )


def remote_settings(args: argparse.Namespace) -> RemoteSettings:
    """What was given.

    Raises:
        UserError: a value cannot be.
    """
    try:
        return RemoteSettings(
            tuple(args.remote_host),
            args.remote_cache,
            args.remote_cache_bytes,
            args.remote_timeout,
            args.remote_attempts,
        )
    except ValueError as error:  # it begins with the name of a field
        field, _, rest = str(error).partition(" ")
        raise UserError(f"{_OPTIONS.get(field.rstrip(':'), field)} {rest}") from None
