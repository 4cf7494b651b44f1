"""Who meets whom when nodes are compared: the first rounds of a tournament, all pairs of a round at once."""

from collections.abc import Mapping, Sequence
from statistics import median

# That each meets: with two slow nodes among them everybody else still meets one who is not.
PEERS = 3
# Of the median: what a node's best pair must reach.
_SLOW = 0.5


def tournament(players: int, peers: int = PEERS) -> list[list[tuple[int, int]]]:
    """Rounds until everybody has met so many others, or all. With an odd number one has a rest in each round,
    and none has two.

    The circle method: the first stays, the others move on by a place. Nobody meets the same one twice.
    """
    circle: list[int | None] = [*range(players)]
    if players % 2:
        circle.append(None)
    half, found = len(circle) // 2, []
    for _ in range(min(peers + players % 2, len(circle) - 1) if players > 1 else 0):
        both = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in both if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def process_pairs(nodes: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
    """The rounds of the nodes' processes: each meets the one of the same number on the other node.

    Args:
        nodes: the ranks of each node.
    """
    return [
        [pair for a, b in pairs for pair in zip(nodes[a], nodes[b], strict=False)]
        for pairs in tournament(len(nodes))
    ]


def slow_ones(best: Mapping[int, float]) -> dict[int, float]:
    """Who is slow, with the share of the median that he reaches.

    With one pair alone both have the same rate: nobody is slow by this.

    Args:
        best: the rate of each one's best pair.
    """
    if not best:
        return {}
    middle = median(best.values())
    return {who: rate / middle for who, rate in best.items() if rate < _SLOW * middle}
