"""What a run allows of remote media: nothing, until it names hosts and a folder for the cache."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from megatron_eagle.data.media.remote.addresses import RemoteAddress, parse_place
from megatron_eagle.errors import UserError
from megatron_eagle.ranges import Range, Ranged

INSTALL = "pip install 'megatron-eagle[remote]'"
_PACKAGES = {
    "s3": ("s3fs",),
    "gs": ("gcsfs",),
    "hf": ("huggingface_hub", "aiohttp", "fsspec"),
    "https": ("aiohttp", "fsspec"),
}
# Credentials come from the environment: which of its variables say that there are any.
CREDENTIALS: Mapping[str, tuple[str, ...]] = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE")
    + ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS",),
    "hf": ("HF_TOKEN",),
    "https": (),
}


@dataclass(frozen=True)
class RemoteSettings(Ranged):
    """Where media may be fetched from, and where they are kept.

    `hosts` are addresses (`s3://bucket`, `gs://bucket/folder`, `hf://datasets/owner/name`, `https://host`):
    what lies below them may be fetched, and nothing else is asked for; empty: remote media are off.  `cache`
    is a folder of this machine, which its processes and other runs share; it holds at most `cache_bytes`, and
    what was not used for longest goes.  A fetch is tried `attempts` times, and fails when nothing comes for
    `timeout_s` seconds.
    """

    hosts: tuple[str, ...] = ()
    cache: str | None = None
    cache_bytes: Annotated[int, Range(1 << 20, 10**17)] = 100_000_000_000
    timeout_s: Annotated[float, Range(0.1, 3600)] = 30.0
    attempts: Annotated[int, Range(1, 20)] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hosts and not self.cache:
            raise ValueError("cache is not set: name a folder of this machine for what is fetched")
        for host in self.hosts:
            try:
                scheme = parse_place(host).scheme
            except ValueError as error:
                raise ValueError(f"hosts: {error}") from None
            for package in _PACKAGES[scheme]:
                if importlib.util.find_spec(package) is None:
                    raise UserError(f"media at {scheme}:// need {package}: {INSTALL}")
        schemes = {place.scheme for place in self.places}
        if (
            "s3" in schemes
            and os.environ.get("AWS_ACCESS_KEY_ID")
            and not os.environ.get("AWS_SECRET_ACCESS_KEY")
        ):
            raise UserError(
                "media at s3://: AWS_ACCESS_KEY_ID is set in the environment, AWS_SECRET_ACCESS_KEY is not"
            )
        file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS", "")
        if "gs" in schemes and file and not os.path.isfile(file):
            raise UserError("media at gs://: GOOGLE_APPLICATION_CREDENTIALS names no file")

    @property
    def places(self) -> tuple[RemoteAddress, ...]:
        """The hosts, read."""
        return tuple(map(parse_place, self.hosts))

    def allow(self, address: RemoteAddress) -> bool:
        """Whether the run names a host below which an address lies."""
        return any(place.holds(address) for place in self.places)
