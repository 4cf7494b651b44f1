"""Messages between real processes: right ones, and what wrong bytes on the way lead to."""

from dataclasses import asdict

import torch

from megatron_eagle.preflight.exchange import Exchange, exchange_messages
from megatron_eagle.preflight.judgement import FindingKind, Gathered, wrong_messages
from megatron_eagle.preflight.rounds import process_pairs
from tests.parallel.harness import launch


def messages(breaks: int | None) -> dict:
    """Of this rank; rank `breaks` sends another number to rank 0 than it should."""
    rank = torch.distributed.get_rank()
    if rank == breaks:
        send = torch.distributed.all_to_all_single

        def broken(theirs: torch.Tensor, mine: torch.Tensor) -> None:
            send(theirs, mine + (torch.arange(len(mine)) == 1))

        torch.distributed.all_to_all_single = broken
    found, begun = Exchange(rank), []
    exchange_messages(found, torch.device("cpu"), process_pairs([[0], [1], [2]]), begun.append)
    assert found.error is None and begun[:2] == ["all-reduce", "all-to-all"] and len(begun) == 6
    return asdict(found)


def gathered(records: list[dict]) -> Gathered:
    nodes = {rank: f"n{rank + 1}" for rank in range(len(records))}
    exchanges = {rank: Exchange(**record) for rank, record in enumerate(records)}
    return Gathered(len(records), 10, nodes=nodes, exchanges=exchanges)


def test_right_messages():
    found = launch(messages, 3, None)
    for rank, record in enumerate(found):
        assert set(record["rates"]) == {0, 1, 2} - {rank}
        assert min(record["rates"].values()) > 0 and set(record["seconds"]) == {"all-reduce", "all-to-all"}
    assert list(wrong_messages(gathered(found))) == []


def test_wrong_bytes_name_their_link():
    found = launch(messages, 3, 2)
    assert [record["wrong_from"] for record in found] == [[2], [], []]
    said = list(wrong_messages(gathered(found)))
    assert [(finding.kind, finding.nodes) for finding in said] == [
        (FindingKind.BAD, ("n1",)),
        (FindingKind.BAD, ("n3",)),
    ]
    assert "from n3 to n1" in said[0].text
    found[1]["wrong_from"] = [2]  # and to another: then it is clear who
    assert [finding.nodes for finding in wrong_messages(gathered(found))] == [("n3",)]
    found[0]["wrong_from"], found[1]["wrong_from"], found[1]["wrong"] = [], [], ["all-reduce"]
    assert ["other sums" in finding.text for finding in wrong_messages(gathered(found))] == [True]
