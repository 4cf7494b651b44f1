"""What a run asked and what it cost."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_PICTURE_TOKENS = 300


def estimated_tokens(content: str | Iterable[Mapping[str, Any]]) -> int:
    """Tokens of a message before it is sent: a token for 4 characters, 300 for a picture."""
    parts = [{"text": content}] if isinstance(content, str) else content
    return sum(-(-len(part["text"]) // 4) if "text" in part else _PICTURE_TOKENS for part in parts)


@dataclass
class Usage:
    """Counts of one run; tokens of cached answers were paid before and are not in `input_tokens`.

    Prices are in currency units per million tokens.
    """

    input_price: float = 0.0
    output_price: float = 0.0
    requests: int = 0
    cached: int = 0
    retries: int = 0
    invalid: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def cost(self) -> float:
        """In the unit of the prices."""
        return (self.input_tokens * self.input_price + self.output_tokens * self.output_price) / 1e6

    def record(self) -> dict[str, float]:
        """As JSON."""
        return {**asdict(self), "cost": round(self.cost, 6)}

    def summary(self) -> str:
        """One line."""
        line = (
            f"{self.requests:,} answers paid, {self.cached:,} from the cache, {self.retries:,} retries, "
            f"{self.invalid:,} invalid; {self.input_tokens:,} tokens in, {self.output_tokens:,} out"
        )
        return line + self._cost()

    def estimate(self) -> str:
        """The line of a dry run."""
        counts = f"{self.requests:,} requests, {self.input_tokens:,} tokens in, {self.output_tokens:,} out"
        return f"estimate, nothing was asked: {counts}{self._cost()}"

    def _cost(self) -> str:
        return f"; cost {self.cost:.4f}" if self.input_price or self.output_price else ""
