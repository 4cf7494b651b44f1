"""One request to an OpenAI-compatible endpoint, and whether its failure is worth a retry."""

import http.client
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem

_WORTH_A_RETRY = {408, 409, 425, 429}


@dataclass(frozen=True)
class Endpoint:
    """Where to ask.

    Attributes:
        url: up to and including `/v1`.
        model: its name there.
        key_variable: of the environment, for the key; without one none is sent (vLLM needs none).
        timeout: seconds.
        input_price, output_price: per million tokens.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    concurrency: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    input_price: float = 0.0
    output_price: float = 0.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("the endpoint's address must be http(s)://HOST[:PORT]/v1")
        if "@" in parts.netloc:
            raise UserError(
                f"the endpoint's address holds a password; put a key into the variable {self.key_variable}"
            )
        for name in ("timeout", "concurrency", "attempts"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("requests_per_minute", "tokens_per_minute"):
            if (limit := getattr(self, name)) is not None and limit <= 0:
                raise UserError(f"{name} must be positive, not {limit}")


class Retry(Exception):
    """The endpoint may do better later; `after` is how many seconds it asked for (None: not said)."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


@dataclass(frozen=True)
class Reply:
    """An answer: its text, whether its token limit cut it off, its tokens as the endpoint counts them."""

    text: str
    truncated: bool
    input_tokens: int
    output_tokens: int


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would send the key along to wherever it is redirected."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def post(endpoint: Endpoint, request: dict[str, Any]) -> Reply:
    """Send one chat completion request and wait for it. No message holds the key.

    Raises:
        Retry: the same request may succeed later.
        Problem: this request is refused.
        UserError: every request would be.
    """
    key = os.environ.get(endpoint.key_variable, "").strip()
    if not key.isprintable() or not key.isascii():
        raise UserError(f"the key in {endpoint.key_variable} holds characters that no key has")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    url = f"{endpoint.url.rstrip('/')}/chat/completions"
    message = urllib.request.Request(url, json.dumps(request).encode(), headers)
    try:
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(message, timeout=endpoint.timeout) as response:
            body = response.read()
    except urllib.error.HTTPError as error:
        raise _refusal(error, endpoint, key) from None
    except (OSError, http.client.HTTPException) as error:  # no connection, timeout, cut off
        reason = getattr(error, "reason", None) or error
        raise Retry(f"{type(reason).__name__}: {reason}") from None
    return _read(body)


def _refusal(error: urllib.error.HTTPError, endpoint: Endpoint, key: str) -> Exception:
    try:
        text = " ".join(error.read(2000).decode(errors="replace").split())
    except (OSError, http.client.HTTPException):
        text = ""
    text = (text.replace(key, "***") if key else text)[:200]
    reason = f"status {error.code}: {text}"
    if error.code in _WORTH_A_RETRY or error.code >= 500:
        try:
            after = max(0.0, float(error.headers.get("Retry-After", "")))
        except ValueError:  # absent, or a date
            after = None
        return Retry(reason, after)
    if error.code in (401, 403):
        return UserError(f"{endpoint.url}: {reason}; is the key in {endpoint.key_variable} right?")
    if error.code in (301, 302, 303, 307, 308, 404, 405):
        return UserError(f"{endpoint.url}: {reason}; give the address up to /v1 and a model that it serves")
    return Problem("refused request", reason)


def _read(body: bytes) -> Reply:
    try:
        value = json.loads(body)
        choice = value["choices"][0]
        text = choice["message"]["content"]
        usage = value.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise Retry("the endpoint's answer is not the JSON of a chat completion") from None
    if not isinstance(text, str):
        raise Retry("the endpoint's answer has no text")
    return Reply(text, choice.get("finish_reason") == "length", *tokens)
