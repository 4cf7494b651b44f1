"""What ranks decode and what they leave out, against one process that decodes everything."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from megatron_eagle.data.loading import loader as loader_module
from megatron_eagle.data.loading.batch import join
from megatron_eagle.data.loading.loader import PackLoader
from megatron_eagle.data.loading.packs import TokenPack
from megatron_eagle.model.inputs import InputPlan
from tests.parallel.cases import Outcome, combine
from tests.parallel.harness import launch
from tests.parallel.store_cells import (
    BAD,
    LENGTH,
    PACKS,
    open_loader,
    run_cell,
    run_cells,
    run_reference,
    write_store,
)

TOLERANCE = 1e-5  # max |g - ref| / max |ref| per tensor, fp32
TP2_CP2 = {"tensor_model_parallel_size": 2, "context_parallel_size": 2}
SHARINGS = [
    TP2_CP2 | {"vision_sharding": mode, "sequence_parallel": sequence_parallel}
    for mode in ("none", "cp", "cp_tp")
    for sequence_parallel in (False, True)
]
# Processes, sizes and packs a sequence.
LAYOUTS = {
    "DP2": (2, {}, 1),
    "CP2": (2, {"context_parallel_size": 2}, 1),
    "PP2": (2, {"pipeline_model_parallel_size": 2}, 1),
    "2 packs a sequence": (2, {}, 2),
    "2 packs a sequence, CP2, ring": (
        4,
        {"context_parallel_size": 2, "context_parallel_comm": "ring", "context_parallel_layout": "zigzag"},
        2,
    ),
}
MORE_LAYOUTS = {
    "2 packs a sequence, PP2": (4, {"pipeline_model_parallel_size": 2}, 2),
    "4 packs a sequence": (4, {}, 4),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def references(store):
    """Of the whole batch, and without the sample of `BAD`; made while all media are there."""
    return {without: launch(run_reference, 1, str(store), without)[0] for without in (None, BAD)}


@pytest.fixture
def broken(store, references):
    """The store, with the file `BAD` missing."""
    file = store.parent / BAD
    file.rename(store.parent / "away")
    yield store
    (store.parent / "away").rename(file)


def worst(results: list[dict], reference: dict) -> tuple[float, str]:
    expected: Outcome = combine([reference])
    return combine(results, check_replicas=False).worst(expected)


def test_ranks_decode_their_share_and_nothing_twice(store, references):
    """Every sharding: the shares are the parts of what one process decodes, bit for bit, and the model sees
    the same."""
    expected = references[None]
    whole = torch.cat([pack["tiles"] for pack in expected["packs"]])
    of_ranks = launch(run_cells, 4, str(store), SHARINGS)
    for number, sharing in enumerate(SHARINGS):
        ranks = [results[number] for results in of_ranks]
        found = [tiles_of(ranks, pack) for pack in range(len(expected["packs"]))]
        assert torch.equal(torch.cat(found), whole), sharing
        assert sum(sum(rank["decoded"].values()) for rank in ranks) == len(whole), "each tile once"
        assert all(sum(rank["decoded"].values()) < len(whole) / 2 for rank in ranks), "shared evenly"
        error = worst(ranks, expected)
        assert error[0] <= TOLERANCE, (sharing, error)


def tiles_of(ranks: list[dict], pack: int) -> torch.Tensor:
    """A pack's tiles, put together from the ranks' shares."""
    shares = [rank["packs"][pack] for rank in ranks if len(rank["packs"][pack]["tiles"])]
    return torch.cat([s["tiles"] for s in sorted(shares, key=lambda s: s["first_tile"])])


def _run_with_wrong_tiles(store: str) -> dict:
    """Every rank decodes the pack's first tiles, whichever it should encode."""
    wrong = property(lambda plan: range(len(plan.vision.share.decoded_tiles)))
    with patch.object(InputPlan, "tiles", wrong):
        return run_cell(store, {"context_parallel_size": 2, "vision_sharding": "cp"})


def test_tiles_of_another_rank_are_noticed(store, references):
    results = launch(_run_with_wrong_tiles, 2, str(store))
    assert worst(results, references[None])[0] > 100 * TOLERANCE


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE_LAYOUTS)])
def test_a_medium_that_one_rank_misses(broken, references, name):
    """Loss and gradients are those of a batch in which its sample never had weight; weights bit for bit."""
    processes, parallel, packs = (LAYOUTS | MORE_LAYOUTS)[name]
    results = launch(run_cell, processes, str(broken), parallel, packs)
    assert all(result["failed"].keys() == {str(broken.parent / BAD)} for result in results)
    if packs > 1:
        assert all(result["failed"][str(broken.parent / BAD)] >= LENGTH for result in results), (
            "in a later pack"
        )
    if packs > 1 and "pipeline_model_parallel_size" not in parallel:
        shares = [sum(result["decoded"].values()) for result in results]
        assert max(shares) - min(shares) <= PACKS // packs, "the tiles of each sequence over all ranks"
    if name == "PP2":
        assert results[0]["decoded"] and not results[1]["decoded"], "only the first stage reads media"
    sequences = [pack["loss_weights"] for result in results for pack in result["packs"]]
    found = {first: weights for weights in sequences for first, weights in weights.items()}
    expected = [pack["loss_weights"] for pack in references[BAD]["packs"]]
    assert torch.equal(torch.stack([found[first] for first in sorted(found)]), torch.stack(expected))
    assert worst(results, references[BAD])[0] <= TOLERANCE
    assert worst(results, references[None])[0] > 100 * TOLERANCE, "the sample matters"


def _run_forgetful(store: str, parallel: dict, packs: int) -> dict:
    """Only the ranks that missed the medium know of it."""
    leave_out = PackLoader.leave_out

    def own_only(self, batch, samples):
        return leave_out(self, batch, set(batch.failures)) if batch.failures else batch

    with patch.object(PackLoader, "leave_out", own_only):
        return run_cell(store, parallel, packs)


@pytest.mark.parametrize("name", ["DP2", "PP2"])
def test_a_rank_that_is_not_told_is_noticed(broken, references, name):
    results = launch(_run_forgetful, 2, str(broken), *LAYOUTS[name][1:])
    assert worst(results, references[BAD])[0] > 100 * TOLERANCE


def _without_bounds(packs: list[TokenPack]) -> TokenPack:
    """The last document of each pack goes on in the next one."""
    whole = join(packs)
    kept = [b for b in whole.document_bounds if b % LENGTH or b in (0, len(whole.input_ids))]
    return replace(whole, document_bounds=kept)


def _with_shifted_numbers(packs: list[TokenPack]) -> TokenPack:
    """Samples of a later pack go by the number of the one before them."""
    whole = join(packs)
    shifted = [replace(s, number=s.number - (s.start >= LENGTH)) for s in whole.samples]
    return replace(whole, samples=shifted)


def _with_own_normalizer(packs: list[TokenPack]) -> TokenPack:
    """The weights of each microbatch add up to its share of all microbatches."""
    whole = join(packs)
    weights = whole.loss_weights
    return replace(whole, loss_weights=weights / weights.sum() * len(packs) / PACKS)


JOINS = {
    "documents that go on": _without_bounds,
    "shifted numbers": _with_shifted_numbers,
    "weights by microbatch": _with_own_normalizer,
}


def _run_joined(store: str, how: str) -> dict:
    """Two packs a sequence, joined in a wrong way."""
    with patch.object(loader_module, "join", JOINS[how]):
        return run_cell(store, {}, 2)


@pytest.mark.parametrize("how", JOINS)
def test_packs_that_are_joined_in_a_wrong_way_are_noticed(store, broken, references, how):
    whole = how == "weights by microbatch"  # where samples are left out, weights are formed anew
    if whole:
        (broken.parent / "away").rename(broken.parent / BAD)
    results = launch(_run_joined, 2, str(store), how)
    if whole:
        (broken.parent / BAD).rename(broken.parent / "away")
    assert worst(results, references[None if whole else BAD])[0] > 100 * TOLERANCE


def test_left_out_is_never_having_been_there(broken, references):
    loader = open_loader(str(broken))
    batch = loader.step(0)
    [number] = batch.failures
    batch = loader.leave_out(batch, {number})
    lost = 0
    for pack, expected in zip(batch.microbatches, references[BAD]["packs"], strict=True):
        assert torch.equal(pack.loss_weights, expected["loss_weights"])
        changed = (pack.pixel_values != expected["tiles"]).flatten(1).any(1)
        assert not pack.pixel_values[changed].any()
        lost += int(changed.sum())
    assert lost == 10, "nine tiles and a thumbnail"
    batch = loader.leave_out(batch, set(range(loader.n_samples(0))))
    assert batch.total == 0 and not any(pack.loss_weights.any() for pack in batch.microbatches)
    assert not any(pack.pixel_values.any() for pack in batch.microbatches)
    loader.close()
