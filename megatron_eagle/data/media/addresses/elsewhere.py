"""Remote addresses that nobody has made a file of this machine of: nothing is asked for here."""

from typing import NoReturn

from megatron_eagle.problems import Problem


class Elsewhere:
    """See `AddressKind`; `media.remote` fetches what a run allows, before any reader sees its name."""

    def metadata(self, path: str) -> NoReturn:
        """Refuse.

        Raises:
            Problem: always.
        """
        raise Problem("remote media are off", f"{path} is no file of this machine")

    fingerprint = open = metadata
