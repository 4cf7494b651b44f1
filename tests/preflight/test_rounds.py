"""Who meets whom when nodes are compared, and who is slow by it: with rates that are known."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from megatron_eagle.preflight.rounds import process_pairs, slow_ones, tournament


@given(st.integers(1, 40), st.integers(1, 50))
def test_a_tournament(players, peers):
    """Nobody is twice in a round, nobody meets the same one again, and all meet as many as they shall."""
    found = tournament(players, peers)
    pairs = [frozenset(pair) for one in found for pair in one]
    assert len(set(pairs)) == len(pairs) and all(len(pair) == 2 for pair in pairs)
    for one in found:
        present = [player for pair in one for player in pair]
        assert len(set(present)) == len(present) == players - players % 2
        assert set(present) <= set(range(players))
    met = Counter(player for pair in pairs for player in pair)
    assert all(met[player] >= min(peers, players - 1) for player in range(players))
    assert len(found) <= peers + 1


def measured(speeds: list[float], spread: float, seed: int) -> dict[int, float]:
    """Each one's best pair, where a pair is as quick as the slower one, give or take `spread`."""
    draw, best = random.Random(seed), {}
    for one in tournament(len(speeds)):
        for a, b in one:
            rate = min(speeds[a], speeds[b]) * draw.uniform(1 - spread, 1 + spread)
            for who in (a, b):
                best[who] = max(rate, best.get(who, 0))
    return best


@given(st.integers(3, 40), st.data())
def test_the_slow_one_is_found_wherever_it_is(nodes, data):
    slow = data.draw(st.integers(0, nodes - 1))
    speeds = [100.0] * nodes
    speeds[slow] = 10.0
    found = slow_ones(measured(speeds, 0.3, data.draw(st.integers(0, 999))))
    assert set(found) == {slow} and 0.05 < found[slow] < 0.2


@given(st.integers(4, 40), st.data())
def test_two_slow_ones_are_found(nodes, data):
    """Also where they meet each other. Of three nodes they would be most, and nothing could be known."""
    slow = data.draw(st.sets(st.integers(0, nodes - 1), min_size=2, max_size=2))
    speeds = [10.0 if node in slow else 100.0 for node in range(nodes)]
    assert set(slow_ones(measured(speeds, 0.2, data.draw(st.integers(0, 999))))) == slow
    speeds[:] = [10.0, 10.0, 100.0]
    assert slow_ones(measured(speeds, 0.0, 0)) == {}


@given(st.lists(st.floats(0.7, 1.3), min_size=1, max_size=40))
def test_nobody_is_slow_where_all_are_alike(rates):
    assert slow_ones(dict(enumerate(rates))) == {}


@given(st.floats(0.001, 1000))
def test_of_two_nobody_is_known_to_be_slow(speed):
    assert slow_ones(measured([speed, 100.0], 0.3, 0)) == {}


def test_processes_meet_those_of_their_number():
    assert process_pairs([[0, 1], [2, 3]]) == [[(0, 2), (1, 3)]]
    assert process_pairs([[0, 1, 2]]) == []
    uneven = process_pairs([[0], [1, 2], [3, 4]])
    assert sorted(uneven) == [[(0, 1)], [(0, 3)], [(1, 3), (2, 4)]]
