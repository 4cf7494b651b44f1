"""A checkpoint of one layout in another: the same bits, the same next step, and no drift after it."""

import pytest
import torch

from megatron_eagle.checkpoint.content import boxes
from tests.checkpoint.contents import different, read_step, read_whole
from tests.checkpoint.steps import steps
from tests.parallel.cases import EXPERTS, tiny_model

AFTER = 2  # iterations before the change
UNTIL = AFTER + 21

TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
WHOLE_ENCODERS = {**TP2, "vision_sharding": "cp_tp"}  # every tensor parallel rank holds the whole encoder
PP2 = {"pipeline_model_parallel_size": 2}
UNEVEN = {**PP2, "num_layers_in_first_pipeline_stage": 1}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2, EP4 = {"expert_model_parallel_size": 2}, {"expert_model_parallel_size": 4}
WHOLE = {"expert_tensor_parallel_size": 1}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted() -> dict:
    """All steps in one process."""
    return steps(1, {}, until=UNTIL)[0]


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        pytest.param((4, TP2), (2, PP2), id="tp2dp2-pp2"),
        pytest.param((1, {}), (2, TP2 | SP), marks=slow, id="one-tp2sp"),
        pytest.param((2, VPP2), (1, {}), marks=slow, id="vpp2-one"),
        pytest.param((4, CP2), (4, TP2 | PP2), marks=slow, id="cp2dp2-tp2pp2"),
        pytest.param((2, WHOLE_ENCODERS), (2, VPP2), marks=slow, id="encoders-vpp2"),
        pytest.param((4, VPP2 | CP2), (1, {}), marks=slow, id="vpp2cp2-one"),
        pytest.param((2, UNEVEN), (2, PP2), marks=slow, id="uneven-pp2"),
        pytest.param((2, PP2), (4, WHOLE_ENCODERS | CP2), marks=slow, id="pp2-tp2cp2"),
    ],
)
def test_continues_in_another_layout(writer, reader, uninterrupted, tmp_path):
    saved, loaded = tmp_path / "saved", tmp_path / "loaded"
    before = steps(*writer, until=AFTER, save=str(saved), against_megatron=True)
    for described, wrong in (rank["different"] for rank in before):
        assert described > 50 and not wrong, "not what Megatron would have saved"

    after = steps(*reader, until=UNTIL, load=str(saved), save_loaded=str(loaded))[0]
    assert different(read_whole(saved), read_whole(loaded)) == []
    assert set(read_step(saved)) == set(read_step(loaded)) == {AFTER}
    assert after["start"] == (AFTER, 4 * AFTER)
    assert after["losses"][0] == pytest.approx(uninterrupted["losses"][AFTER], rel=1e-5)
    assert after["norms"][0] == pytest.approx(uninterrupted["norms"][AFTER], rel=1e-5)
    # Adam divides by the root of tiny second moments and so amplifies rounding.
    assert len(after["losses"]) == 21
    assert after["losses"] == pytest.approx(uninterrupted["losses"][AFTER:], rel=1e-3)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        pytest.param((1, {}), (2, EP2), id="one-ep2"),
        pytest.param((2, EP2), (4, EP4), marks=slow, id="ep2-ep4"),
        pytest.param((4, EP4), (1, {}), marks=slow, id="ep4-one"),
        pytest.param((4, TP2 | SP | EP2), (4, PP2 | EP2), marks=slow, id="tp2ep2-pp2ep2"),
        pytest.param((2, TP2 | SP | EP2 | WHOLE), (2, TP2 | SP), marks=slow, id="whole-divided"),
        pytest.param((4, VPP2 | EP2), (4, CP2 | EP4), marks=slow, id="vpp2ep2-cp2ep4"),
    ],
)
def test_experts_continue_in_another_layout(writer, reader, tmp_path):
    saved, loaded, eagle = tmp_path / "saved", tmp_path / "loaded", tiny_model(**EXPERTS)
    straight = steps(1, {}, eagle=eagle, until=AFTER + 3)[0]
    before = steps(*writer, eagle=eagle, until=AFTER, save=str(saved), against_megatron=True)
    for described, wrong in (rank["different"] for rank in before):
        assert described > 100 and not wrong, "not what Megatron would have saved"
    after = steps(*reader, eagle=eagle, until=AFTER + 3, load=str(saved), save_loaded=str(loaded))[0]
    whole = read_whole(saved)
    assert whole["language_model.decoder.layers.mlp.experts.experts.linear_fc1.weight"].shape[:2] == (4, 8)
    assert different(whole, read_whole(loaded)) == []
    assert set(read_step(saved)) == set(read_step(loaded)) == {AFTER}
    assert after["losses"] == pytest.approx(straight["losses"][AFTER:], rel=1e-5)
    assert after["norms"] == pytest.approx(straight["norms"][AFTER:], rel=1e-4)


@pytest.mark.slow
def test_experts_resume_bit_for_bit(tmp_path):
    layout, eagle = (4, TP2 | SP | EP2), tiny_model(**EXPERTS)
    straight = steps(*layout, eagle=eagle, until=AFTER + 2)
    steps(*layout, eagle=eagle, until=AFTER, save=str(tmp_path))
    resumed = steps(*layout, eagle=eagle, until=AFTER + 2, load=str(tmp_path))
    for one, other in zip(straight, resumed, strict=True):
        assert one["losses"][AFTER:] == other["losses"]
        for name, parameter in one["parameters"].items():
            assert torch.equal(parameter, other["parameters"][name]), name


def test_a_lost_optimizer_state_would_be_seen(uninterrupted, tmp_path):
    """Negative control: with the weights alone the next loss fits, and neither bits nor later losses do."""
    saved, loaded = tmp_path / "saved", tmp_path / "loaded"
    steps(1, {}, until=AFTER, save=str(saved))
    after = steps(2, TP2, until=4, load=str(saved), weights_only=True, save_loaded=str(loaded))[0]
    assert after["losses"][0] == pytest.approx(uninterrupted["losses"][AFTER], rel=1e-5)
    assert after["losses"] != pytest.approx(uninterrupted["losses"][AFTER : AFTER + 4], rel=1e-3)
    found = different(read_whole(saved), read_whole(loaded))
    assert found and all(key.startswith("optimizer.state.exp_avg") for key in found)


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4), (1, 1, 5), ()])
def test_boxes_hold_a_run_of_elements_once(shape):
    """Every run of every small tensor, in memory order."""
    count = torch.Size(shape).numel()
    whole = torch.arange(count).view(shape)
    for start in range(count + 1):
        for stop in range(start, count + 1):
            found = []
            for offset, size in boxes(shape, start, stop):
                box = tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))
                assert whole[box].shape == size
                found += whole[box].flatten().tolist()
            assert found == list(range(start, stop))
