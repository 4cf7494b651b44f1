"""Remote addresses: what they consist of, which are refused, and where one stands inside another name."""

import posixpath
import re
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit

from megatron_eagle.problems import Problem

SCHEMES = ("s3", "gs", "hf", "https")
_REMOTE = re.compile(rf"(?:{'|'.join(SCHEMES)})://", re.IGNORECASE)
# What a remote file is, what is inside it (a member, a page), and where that is.
_NAME = re.compile(
    rf"(?P<before>(?:(?:tar|zip|pdf)://)*)(?P<address>(?:{'|'.join(SCHEMES)})://.+?)"
    r"(?P<after>(?:\?(?:offset|page)=\d+&size=[0-9x]+(?:&crc=[0-9a-f]{8})?)*)",
    re.DOTALL,
)
_HUB_KINDS = ("datasets", "models", "spaces", "buckets")  # in front of OWNER/NAME
# Parameters that let whoever has the address read: they would stand in stores, logs and ledgers.
_SECRETS = frozenset(
    ("x-amz-signature", "x-amz-credential", "x-amz-security-token", "x-goog-signature", "x-goog-credential")
    + ("signature", "sig", "token", "access_token", "api_key", "apikey", "key", "auth", "password", "secret")
)


@dataclass(frozen=True)
class RemoteAddress:
    """`place` is a bucket, a repository of the hub or a host; `path` what is there, maybe nothing."""

    scheme: str
    place: str
    path: str
    revision: str = ""  # of a repository

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.host}{revision}/{self.path}".removesuffix("/")

    @property
    def host(self) -> str:
        """The address without its path, as a run names it."""
        return f"{self.scheme}://{self.place}"

    def holds(self, other: "RemoteAddress") -> bool:
        """Whether the other one is this, or lies below it."""
        if (self.scheme, self.place) != (other.scheme, other.place):
            return False
        return not self.path or other.path == self.path or other.path.startswith(f"{self.path}/")


def is_remote(name: str) -> bool:
    """Whether a name begins as a remote address does."""
    return _REMOTE.match(name) is not None


def parse_place(text: str) -> RemoteAddress:
    """An address, which may be of all that a place holds.

    Raises:
        ValueError: it is none, or holds credentials; the message does not repeat them.
    """
    scheme, _, rest = text.partition("://")
    scheme, named = scheme.lower(), repr(without_secrets(text)[:60])
    if scheme not in SCHEMES:
        raise ValueError(f"{named} is no address of {', '.join(f'{s}://' for s in SCHEMES)}")
    place, _, path = rest.partition("/")
    revision = ""
    if scheme == "https":
        place = _web_host(text)
        if "#" in path:
            raise ValueError(f"{named} has a #, which ends an address of the web; of a file's name it is %23")
    elif scheme == "hf":
        place, revision, path = _hub_parts(rest)
    if not place or re.search(r"[\s\\@]", place) or (scheme in ("s3", "gs") and _has_password(place)):
        raise ValueError(f"{named} names no bucket, repository or host")
    read = unquote(path) if scheme == "https" else path  # %2e%2e is .. to web servers and their clients
    if ".." in path.partition("?")[0].split("/") or ".." in read.partition("?")[0].split("/"):
        raise ValueError(f"{named} has .. in its path")
    if re.search(r"[\\\0-\x1f]", read):
        raise ValueError(f"{named} has a backslash or a line end in its path")
    return RemoteAddress(scheme, place, path.rstrip("/"), revision)


def parse_address(text: str) -> RemoteAddress:
    """The address of a file.

    Raises:
        Problem: it is none.
    """
    try:
        address = parse_place(text)
    except ValueError as error:
        raise Problem("bad media reference", str(error)) from None
    if not address.path:
        raise Problem("bad media reference", f"{without_secrets(text)[:60]!r} names no file")
    return address


def without_secrets(text: str) -> str:
    """What a message may say of an address: not what stands before an @ or behind a question mark in it."""
    return re.sub(r"(?s)[?#].*", "?...", re.sub(r"(?s)://.*@", "://...@", text))


def _has_password(place: str) -> bool:
    """Whether NAME:PASSWORD stands where a bucket should; the ARN of an access point has colons too."""
    return ":" in place and not place.startswith("arn:")


def _web_host(text: str) -> str:
    """HOST or HOST:PORT of a web address."""
    parts = urlsplit(text)
    if "@" in parts.netloc:
        raise ValueError(
            f"an address of {parts.hostname} with a name or password in it; they are not kept in addresses"
        )
    for name in map(unquote, re.findall(r"[?&;#]([^=&;#]*)=", text)):
        if name.lower() in _SECRETS:
            raise ValueError(
                f"an address of {parts.hostname} signed by {name}=; secrets are not kept in addresses"
            )
    port = "" if parts.port in (None, 443) else f":{parts.port}"
    host = parts.hostname or ""
    return f"[{host}]{port}" if ":" in host else f"{host}{port}"


def _hub_parts(rest: str) -> tuple[str, str, str]:
    """KIND/OWNER/NAME, the revision, and the path."""
    parts = rest.split("/")
    n = 3 if parts[0] in _HUB_KINDS else 2
    if len(parts) < n or not all(parts[:n]):
        return "", "", ""
    name, _, revision = parts[n - 1].partition("@")
    return "/".join([*parts[: n - 1], name]), revision, "/".join(parts[n:])


@dataclass(frozen=True)
class RemoteName:
    """The name of a medium whose file is remote: `address`, between what says which part of it is meant."""

    before: str
    address: str
    after: str

    def at(self, path: str) -> str:
        """The same medium of another file."""
        return f"{self.before}{path}{self.after}"


def remote_name(name: str) -> RemoteName | None:
    """A name in which a remote address stands, or None."""
    if "://" not in name:
        return None
    match = _NAME.fullmatch(name)
    return match and RemoteName(match["before"], match["address"], match["after"])


def below(root: str, path: str) -> str:
    """The address of `path`, relative to the remote folder `root`.

    Raises:
        Problem: it leads out of its bucket, repository or host.
    """
    folder = parse_place(root)
    if folder.scheme == "https":
        path = path.replace("?", "%3F").replace("#", "%23")  # it is the name of a file, not an address
    joined = posixpath.normpath(posixpath.join(folder.path, path))
    if joined.startswith("..") or joined == ".":
        raise Problem("bad media reference", f"{path!r} is no file below {root}")
    return str(replace(folder, path=joined))
