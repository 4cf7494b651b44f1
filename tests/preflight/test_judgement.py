"""Whose fault it is: one node's, everybody's, or nobody's that can be known."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_eagle.preflight.exchange import Exchange
from megatron_eagle.preflight.gpu_state import GpuState
from megatron_eagle.preflight.judgement import MOST_SKEW, Finding, FindingKind, Gathered, judge, wrong_clocks
from megatron_eagle.preflight.node import Report
from megatron_eagle.preflight.report import report_lines
from megatron_eagle.preflight.rounds import process_pairs

GPU = GpuState(0, "GPU-0", "NVIDIA H100 80GB HBM3", "535.129.03", True, True, 0)


def healthy(nodes: int = 4, *, gpus: int = 0, processes: int = 1) -> Gathered:
    """What is heard where all is well; with `gpus` of them a node."""
    names = {
        f"n{number + 1}": [*range(number * processes, (number + 1) * processes)] for number in range(nodes)
    }
    gathered = Gathered(nodes * processes, 60, expected=dict.fromkeys(names, processes), exchanges={})
    rounds = process_pairs(list(names.values()))
    for node, ranks in names.items():
        own = [replace(GPU, index=i, uuid=f"{node}-{i}") for i in range(gpus)]
        for local, rank in enumerate(ranks):
            gathered.nodes[rank] = node
            cuda = GPU.name if gpus else None
            gathered.reports[rank] = Report(node, rank, local, cuda, own)
            partners = [sum(pair) - rank for pairs in rounds for pair in pairs if rank in pair]
            gathered.exchanges[rank] = Exchange(rank, rates=dict.fromkeys(partners, 1e9))
        first = gathered.reports[ranks[0]]
        first.commit, first.source, first.versions = "abc", "123", {"torch": "2.13.0", "numpy": "2.3"}
        first.there, first.free = {"/data/run": "/data"}, {"/data/run": 10**12}
        gathered.clocks[node] = (0.001, 0.002)
    gathered.wrote = {"/data": list(names)}
    gathered.saw = {node: {"/data": list(names)} for node in names}
    return gathered


def found(gathered: Gathered, *, promised: bool = False) -> list[Finding]:
    findings = judge(gathered, gpus_promised=promised)
    lines = list(report_lines(gathered, findings, 1.0))
    assert all(str(finding) in lines for finding in findings)
    rows = {line.split()[0]: line for line in lines[2 : 2 + len(gathered.expected)]}
    for finding in findings:
        for node in finding.nodes if finding.kind != FindingKind.NOTE else ():
            assert finding.kind in rows[node], "the table marks it"
    return findings


def test_nothing_is_said_where_all_is_well():
    assert found(healthy()) == [] == found(healthy(2)) == found(healthy(1))
    assert found(healthy(gpus=8, processes=8), promised=True) == []
    lines = list(report_lines(healthy(gpus=2), [], 3.21))
    assert lines[0] == "preflight: 4 nodes, 4 processes, 3.2 s"
    assert " ".join(lines[2].split()) == "n1 1 2 NVIDIA H100 80GB HBM3 1000.0 GB +0.001 s 1.0 GB/s"
    assert lines[-1] == "preflight: nothing stands in the way"


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        (4, [(FindingKind.BAD, ("n3",), "numpy 2.2 (2.3), torch absent (2.13.0): make it the same")]),
        (
            2,
            [
                (
                    FindingKind.MISTAKE,
                    (),
                    "nodes differ: numpy 2.3 on n1, 2.2 on n2, torch 2.13.0 on n1, absent on n2",
                )
            ],
        ),
    ],
)
def test_other_packages(nodes, expected):
    gathered = healthy(nodes)
    gathered.reports[min(2, nodes - 1)].versions = {"numpy": "2.2"}
    (finding,) = found(gathered)
    ((kind, named, text),) = expected
    assert (finding.kind, finding.nodes) == (kind, named) and text in finding.text


def test_another_commit():
    gathered = healthy()
    gathered.reports[1].commit = "def"
    gathered.reports[1].source = "456"
    gathered.reports[2].commit = None  # git cannot tell there: no commit of its own
    (finding,) = found(gathered)
    assert finding.nodes == ("n2",) and "commit def (abc), code of fingerprint 456 (of fing" in finding.text


def test_files():
    """On one node, on all, and where most have no other."""
    gathered = healthy()
    gathered.reports[2].problems = ["x cannot be read: No such file or directory"]
    assert [finding.nodes for finding in found(gathered)] == [("n3",)]
    for rank in range(4):
        gathered.reports[rank].problems = ["x cannot be read: No such file or directory"]
    assert [(finding.kind, finding.nodes) for finding in found(gathered)] == [(FindingKind.MISTAKE, ())]
    gathered = healthy()
    gathered.unwritten = {"n2": ["/data cannot be written: Read-only file system"]}
    gathered.wrote["/data"].remove("n2")
    for node in gathered.nodes.values():
        gathered.saw[node]["/data"].remove("n2")
    assert [(finding.kind, finding.nodes) for finding in found(gathered)] == [(FindingKind.BAD, ("n2",))]
    gathered = healthy()
    gathered.reports[3].there = {"/data/run": "/"}
    (finding,) = found(gathered)
    assert finding.nodes == ("n4",) and "only / is there, and /data elsewhere" in finding.text


@given(st.integers(3, 12), st.data())
def test_a_folder_of_its_own(nodes, data):
    """A node whose file system is another sees itself alone, and is seen by none; the first one as well."""
    gathered, odd = healthy(nodes), f"n{data.draw(st.integers(1, nodes))}"
    for node in gathered.saw:
        gathered.saw[node]["/data"] = [odd] if node == odd else [n for n in gathered.saw if n != odd]
    assert [(finding.kind, finding.nodes) for finding in found(gathered)] == [(FindingKind.BAD, (odd,))]


def test_folders_of_two_and_of_all():
    for nodes in (2, 4):
        gathered = healthy(nodes)
        for node in gathered.saw:
            gathered.saw[node]["/data"] = [node]
        (finding,) = found(gathered)
        assert finding.kind == FindingKind.MISTAKE and "is not one folder for them" in finding.text


@given(st.integers(3, 40), st.floats(-1e9, 1e9), st.data())
def test_a_clock(nodes, common, data):
    """Whichever it is, rank 0's included, whose own is where the others are measured from."""
    odd = data.draw(st.integers(1, nodes))
    off = data.draw(st.sampled_from([-60.0, 60.0]))
    clocks = {f"n{n}": (common + (off if n == odd else 0.0), 0.01) for n in range(1, nodes + 1)}
    (finding,) = wrong_clocks(clocks)
    assert (finding.kind, finding.nodes) == (FindingKind.BAD, (f"n{odd}",))
    assert f"60.0 s {'ahead of' if off > 0 else 'behind'} the others" in finding.text


def test_clocks_that_are_near_enough():
    assert list(wrong_clocks({"a": (0, 0.1), "b": (MOST_SKEW, 0.1), "c": (0, 0.1)})) == []
    assert list(wrong_clocks({"a": (0, 0.1), "b": (60, 70), "c": (0, 0.1)})) == [], (
        "a slow answer proves nothing"
    )
    assert list(wrong_clocks({"a": (0, 0.1)})) == []
    (finding,) = wrong_clocks({"a": (0, 0.1), "b": (-9, 0.1)})
    assert (
        finding.kind == FindingKind.MISTAKE and finding.nodes == ("a", "b") and "9.0 s apart" in finding.text
    )


def test_gpus():
    gathered = healthy(gpus=2, processes=2)
    reports = gathered.reports
    reports[2].gpus = reports[3].gpus = reports[2].gpus[:1]
    reports[4].gpus[1] = replace(GPU, uuid="x", index=1, ecc_errors=3, persistence=False)
    reports[5].gpus[0] = replace(GPU, uuid="n3-0", name="NVIDIA H100 PCIe", slowdowns=("power brake",))
    reports[6].cuda = None
    said = {(finding.kind, *finding.nodes, finding.text) for finding in found(gathered)}
    assert said == {
        (FindingKind.BAD, "n2", "1 GPUs, and 2 processes want one each"),
        (
            FindingKind.BAD,
            "n3",
            "its GPUs are NVIDIA H100 80GB HBM3, NVIDIA H100 PCIe, and NVIDIA H100 80GB HBM3 on other nodes",
        ),
        (FindingKind.BAD, "n3", "GPU 1 has had 3 memory errors that ECC could not correct: reset it"),
        (FindingKind.BAD, "n3", "GPU 0 is held down: power brake: look at cooling and power"),
        (FindingKind.BAD, "n4", "torch finds no GPU for rank 6: driver, or a torch without CUDA?"),
        (FindingKind.NOTE, "n3", "persistence mode is off: starts take longer"),
    }
    assert found(healthy()) == [], "a job without GPUs"
    assert len(found(healthy(), promised=True)) == 4, "but not where Slurm has given it some"


def test_who_is_not_there():
    gathered = healthy(processes=2)
    gathered.exchanges = None
    for rank in (4, 5):
        del gathered.nodes[rank], gathered.reports[rank]
    del gathered.reports[3]
    gathered.at[3] = "a look at files"
    (stands, absent) = sorted(found(gathered), key=lambda finding: finding.nodes)
    assert stands.nodes == ("n2",) and "rank 3 came" in stands.text and "at: a look at files" in stands.text
    assert absent.nodes == ("n3",) and "2 of its processes (2) have not come within 60 s" in absent.text
    gathered.expected = {}
    texts = [finding.text for finding in judge(gathered, gpus_promised=False)]
    assert "of ranks 4, 5 nothing was heard within 60 s: were all processes started?" in texts


def test_who_stands_still_is_named_and_not_who_waits_for_him():
    gathered = healthy()
    del gathered.exchanges[2]
    gathered.at[2] = "round 1 of pairs"
    for exchange in gathered.exchanges.values():
        exchange.error, exchange.rates = "round 1 of pairs: timed out", {}
    (finding,) = found(gathered)
    assert finding.nodes == ("n3",) and "at: round 1 of pairs" in finding.text
    gathered.exchanges[2] = replace(gathered.exchanges[1], rank=2)
    (finding,) = found(gathered)
    assert (
        finding.kind == FindingKind.MISTAKE
        and "messages do not get through: n1: round 1 of pairs" in finding.text
    )


def test_slow_nodes():
    gathered = healthy(processes=2)
    for exchange in gathered.exchanges.values():
        exchange.rates = {peer: 1e8 if {peer, exchange.rank} & {4, 5} else 1e9 for peer in exchange.rates}
    (finding,) = found(gathered)
    assert str(finding).startswith(
        "slow node: n3: the best pair reaches 100.0 MB/s, and the median is 1.0 GB/s"
    )
    gathered.exchanges[4].rates = dict.fromkeys(gathered.exchanges[4].rates, 1e9)
    assert "the best pair of rank 5 reaches" in found(gathered)[0].text


def test_two_nodes_have_one_link():
    """Slow or not, neither is named; one process of eight whose pair is slow is said of both."""
    gathered = healthy(2, processes=4)
    for exchange in gathered.exchanges.values():
        exchange.rates = dict.fromkeys(exchange.rates, 1e6)
    assert found(gathered) == []
    assert "two nodes have one link" in "\n".join(report_lines(gathered, [], 1.0))
    for rank in (1, 5):
        gathered.exchanges[rank].rates = {6 - rank: 1e5}
    (finding,) = found(gathered)
    assert (finding.kind, finding.nodes) == (FindingKind.NOTE, ("n1", "n2"))
