"""The planner: states and parameters of the 8B model by hand, the schedule, ranking, refusals, the tool."""

import json
import math
import runpy
import sys
from dataclasses import replace

import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.model.flops import exchange_costs, pair_costs, training_flops
from megatron_eagle.model.lora import LoraConfig
from megatron_eagle.model.presets import preset
from megatron_eagle.model.shapes import PackShapes, StageShapes
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.planning import rates
from megatron_eagle.planning.context_work import ContextWork, context_work
from megatron_eagle.planning.memory_model import fullest_stage, in_flight, offloaded_bytes, peak_memory
from megatron_eagle.planning.memory_shapes import Workload, count_parameters, language_layer
from megatron_eagle.planning.planner import PackShape, plan_layouts, preset_run
from megatron_eagle.planning.rates import Machine
from megatron_eagle.planning.step_time import step_time
from megatron_eagle.runtime.gpus import GPUS, find_gpu
from megatron_eagle.runtime.parallel import ParallelConfig
from tests.paths import REPO

EAGLE = preset("eagle2.5-8b").complete()
COSTS = pair_costs(EAGLE)
EXCHANGE = exchange_costs(EAGLE, ParallelConfig(context_parallel_size=4), ranks_per_node=8)
WORKLOAD = Workload(sequence_length=32768, tiles=64, microbatches=4)
SHAPES = PackShapes(EAGLE, ParallelConfig(), WORKLOAD.sequence_length)
MACHINE = Machine.of(GPUS["h200"])


def layout(tp=1, sp=False, pp=1, vpp=None, cp=1, **rest):
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=sp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        **rest,
    )


def plans(gpus=8, memory=80e9, *overrides):
    config = preset_run("eagle2.5-8b", 32768, 64, overrides)
    return plan_layouts(config, gpus, memory, PackShape.assumed(32768, config.model.tokens_per_tile), MACHINE)


def test_states_of_the_8b_model_by_hand():
    """TP4 x PP2 x CP2 x DP4, first stage: 14 layers, the embedding, a quarter of encoder and connector."""
    layer = (3584 * 4608 + 4608 + 3584 * 3584) // 4 + 3 * 3584 * 18944 // 4 + 2 * 3584
    embedding = 152064 * 3584 // 4  # 151,676 rows, padded to 297 x 512
    block = (4 * 1152**2 + 2 * 1152 * 4304 + 3 * 1152 + 4304) // 4 + 6 * 1152  # whole: norms, output biases
    encoder = 27 * block + 1152 * (3 * 14 * 14 + 1) + 1024 * 1152 + 2 * 1152
    connector = 2 * 4608 + (4608 * 3584 + 3584 * 3584 + 3584) // 4 + 3584
    parameters = 14 * layer + embedding + encoder + connector
    assert layer == 58_269_824

    parallel = layout(tp=4, sp=True, pp=2, cp=2)
    memory = peak_memory(EAGLE, parallel, 4, WORKLOAD, stage=0)
    assert memory.weights == 2 * parameters
    assert memory.gradients == 4 * parameters
    assert memory.optimizer == 12 * math.ceil(parameters / 8)  # fp32 weights and two moments over 2 x 4 ranks
    last = peak_memory(EAGLE, parallel, 4, WORKLOAD, stage=1)
    assert last.weights == 2 * (14 * layer + 3584 + embedding)


def test_training_states_of_the_whole_model():
    """18 bytes a parameter: 144.5 GB and the padded vocabulary's rows."""
    memory = peak_memory(EAGLE, layout(), 1, WORKLOAD, stage=0)
    assert memory.states == 18 * count_parameters(SHAPES, StageShapes.of(SHAPES, 0)).total
    assert memory.states / 1e9 == pytest.approx(144.5, rel=5e-3)


def test_one_language_layer_by_hand():
    """bf16 bytes a token: two norms of 4 x 3584 + 4 (their input and output; 8 x in plain torch, with a copy
    in fp32), attention, gate, up and their product of 18944 (and silu(gate) in plain torch). Frozen weights
    keep neither the norms' outputs nor the product; adapters keep them all, and what they make of them."""
    attention = 2 * (3584 + 2 * 512 + 3584 + 512 + 3584) + 4 * 28
    norms, mlp = 2 * (4 * 3584 + 4), 2 * 3 * 18944
    assert language_layer(SHAPES, WORKLOAD).total == 32768 * (norms + attention + mlp)
    eager = replace(WORKLOAD, eager=True)
    assert language_layer(SHAPES, eager).total == 32768 * (2 * (8 * 3584 + 4) + attention + mlp + 2 * 18944)
    frozen = replace(WORKLOAD, trainable=("vision", "connector"))
    kept = norms - 2 * 2 * 3584 + attention + mlp - 2 * 18944
    assert language_layer(SHAPES, frozen).total == 32768 * kept
    adapted = replace(WORKLOAD, lora=LoraConfig(rank=8))
    assert language_layer(SHAPES, adapted).total == 32768 * (norms + attention + mlp + 7 * 8 * 2)
    some = replace(WORKLOAD, lora=LoraConfig(rank=8, target_modules=["q_proj", "up_proj"]))
    assert language_layer(SHAPES, some).total == 32768 * (norms + attention + mlp - 2 * 18944 + 2 * 8 * 2)


def test_tensor_parallelism_takes_less_memory():
    found = [fullest_stage(EAGLE, layout(tp=tp, sp=tp > 1), 1, WORKLOAD) for tp in (1, 2, 4)]
    for name in ("weights", "gradients", "optimizer", "activations", "vision", "logits"):
        values = [memory.parts[name] for memory in found]
        assert values == sorted(values, reverse=True) and values[0] > values[2], name


def test_context_parallelism_takes_less_memory():
    found = [fullest_stage(EAGLE, layout(cp=cp), 1, WORKLOAD).total for cp in (1, 2, 4)]
    assert found == sorted(found, reverse=True)


def test_the_fused_loss_by_hand():
    """8B at 32K: plain keeps the logits twice over; fused one chunk of 2048 and the weight's gradient."""
    plain = peak_memory(EAGLE, layout(), 1, WORKLOAD, stage=0)
    assert plain.moment == "loss" and plain.logits == 32768 * 152064 * (2 + 4)
    hidden, weight = 32768 * 3584 * 2, 152064 * 3584
    found = {}
    for name, settings in {"own": {}, "main": {"loss_into_main_grad": True}}.items():
        workload = replace(WORKLOAD, fused_loss=True, **settings)
        found[name] = peak_memory(EAGLE, layout(), 1, workload, stage=0)
    assert found["own"].logits == 2 * hidden + 4 * weight + 2 * weight  # its backward
    chunk = 2048 * (152064 + 3584) * 2
    assert found["main"].logits == max(hidden + chunk, 2 * hidden + 2 * weight)

    def seconds(**settings):
        workload = replace(WORKLOAD, **settings)
        return step_time(
            EAGLE, layout(), 1, workload, mean_tiles=64, sum_squared_lengths=32768**2, machine=MACHINE
        )

    assert seconds(fused_loss=True).elementwise < seconds().elementwise
    assert seconds(fused_loss=True).matrix_products == seconds().matrix_products


def test_context_parallel_work_is_counted_for_the_packs():
    whole, short = [0, 32768], [*range(0, 32768 + 1, 512)]
    uneven = [0, 24576, 32768]
    gathered = context_work(layout(cp=4), [whole], COSTS, EXCHANGE)
    assert gathered == (ContextWork(32768 * 3 / 4, 1.0))
    assert context_work(layout(cp=4), [short], COSTS, EXCHANGE).remote_keys < 512
    assert (
        context_work(layout(cp=4, context_parallel_layout="zigzag"), [short], COSTS, EXCHANGE).remote_keys
        == 0.0
    )
    assert (
        context_work(layout(cp=4, context_parallel_layout="zigzag"), [uneven], COSTS, EXCHANGE).imbalance
        > 1.2
    )
    assert context_work(layout(cp=4), [uneven], COSTS, EXCHANGE).imbalance < 1.02
    ring = layout(cp=4, context_parallel_comm="ring")
    assert context_work(ring, [whole], COSTS, EXCHANGE).remote_keys == 32768 * 3 / 4
    half = [0, 16384, 32768]  # two ranks each: the ring is one step long
    ring = layout(cp=4, context_parallel_comm="ring", context_parallel_layout="contiguous")
    assert context_work(ring, [half], COSTS, EXCHANGE).remote_keys == 32768 / 4
    nodes = layout(cp=4, context_parallel_comm="ring", ring_node_size=2)  # a node gathers what goes round
    assert context_work(nodes, [whole], COSTS, EXCHANGE).remote_keys == 32768 * 3 / 4
    assert context_work(nodes, [half], COSTS, EXCHANGE).remote_keys == 32768 / 4
    assert context_work(layout(cp=4, ulysses_parallel_size=4), [whole], COSTS, EXCHANGE) == ContextWork(
        0.0, 1.0
    )

    def seconds(parallel, bounds, recompute="none"):
        workload = replace(WORKLOAD, tiles=0, recompute=RecomputeConfig(recompute))
        return step_time(
            EAGLE,
            parallel,
            1,
            workload,
            mean_tiles=0,
            sum_squared_lengths=32768**2,
            machine=MACHINE,
            document_bounds=[bounds],
        )

    # Bytes by hand, 28 layers and 4 microbatches: keys and values of 512 features, twice bf16 and once fp32.
    keys = 28 * 4 * (32768 * 3 / 4) * 2 * 512 * (2 + 2 + 4)
    assert seconds(layout(cp=4), whole).context_parallel == pytest.approx(keys / MACHINE.link)
    # Queries, keys, values and outputs of 4608 features there and of their gradients back, 3 of 4 parts.
    heads = 28 * 4 * (32768 / 4) * 2 * (3584 + 512) * 2 * 2 * 3 / 4
    ulysses = layout(cp=4, ulysses_parallel_size=4)
    assert seconds(ulysses, whole).context_parallel == pytest.approx(heads / MACHINE.link)
    assert seconds(ulysses, whole, "full").context_parallel == pytest.approx(1.5 * heads / MACHINE.link)
    assert seconds(layout(cp=4), short).context_parallel < 0.05 * keys / MACHINE.link
    zigzag = layout(cp=4, context_parallel_layout="zigzag")
    assert seconds(zigzag, uneven).attention > 1.2 * seconds(layout(cp=4), uneven).attention


def test_pipelines_hold_the_encoders_activations_of_several_microbatches():
    one, two = (peak_memory(EAGLE, layout(pp=pp), 1, WORKLOAD, stage=0) for pp in (1, 2))
    assert two.states < 0.6 * one.states
    assert two.vision == 2 * one.vision


def test_recompute_trades_time_for_memory():
    found = []
    for policy in ("none", "selective", "full", "offload"):
        workload = replace(
            WORKLOAD, recompute=RecomputeConfig(policy, "full" if policy in ("offload", "full") else "none")
        )
        time = step_time(
            EAGLE, layout(), 1, workload, mean_tiles=64, sum_squared_lengths=32768**2, machine=MACHINE
        )
        found.append((fullest_stage(EAGLE, layout(), 1, workload).total, time.total))
    assert found[0][0] > found[1][0] > found[2][0]
    assert found[0][1] < found[1][1] < found[2][1]
    # Offload keeps less still, and does not run attention again.
    assert found[3][0] < found[2][0] and found[3][1] < found[2][1]
    # 26 of 28 layers leave input, attention output and, per query head, its statistics.
    assert offloaded_bytes(EAGLE, layout(), workload, 0) == 26 * 32768 * (2 * 3584 + 2 * 3584 + 4 * 28)


def test_frozen_parts_have_no_gradients_states_or_vision_activations():
    connector = replace(WORKLOAD, trainable=("connector",))
    memory = peak_memory(EAGLE, layout(), 1, connector, stage=0)
    assert memory.gradients == 4 * count_parameters(SHAPES, StageShapes.of(SHAPES, 0)).connector
    everything = peak_memory(EAGLE, layout(), 1, WORKLOAD, stage=0)
    assert memory.weights == everything.weights and memory.vision < everything.vision / 10
    language = replace(WORKLOAD, trainable=("language",))
    assert peak_memory(EAGLE, layout(), 1, language, stage=0).vision == 0


@pytest.mark.parametrize(
    ("parallel", "stage", "microbatches", "held"),
    [
        (layout(), 0, 8, [1]),
        (layout(pp=4), 0, 8, [4]),  # one forward, one backward: stages - stage microbatches
        (layout(pp=4), 3, 8, [1]),
        (layout(pp=4), 0, 2, [2]),
        # Interleaved, hand-walked: F 0a 1a 0b 1b 2a | B 0b F 3a B 1b F 2b B 0a ... on the first stage,
        # F 0a 1a 0b | B 0b F 1b B 1b F 2a B 0a ... on the last.
        (layout(pp=2, vpp=2), 0, 4, [5, 5]),
        (layout(pp=2, vpp=2), 1, 4, [3, 3]),
    ],
)
def test_microbatches_in_flight(parallel, stage, microbatches, held):
    """Counted in chunks when a backward of each chunk begins."""
    chunks = parallel.num_model_chunks
    assert [sum(at) for at in in_flight(parallel, microbatches, stage, [(1, 0)] * chunks)] == held


def test_a_ring_across_nodes_uses_the_adapters_of_its_members():
    machine = MACHINE
    assert machine.bandwidth(8, 1) == MACHINE.link
    assert machine.bandwidth(16, 1) == 8 * 45e9  # eight members a node
    assert machine.bandwidth(4, 4) == 2 * 45e9  # two
    assert machine.bandwidth(2, 8) == 45e9


def test_an_all_to_all_across_nodes_passes_each_ranks_own_adapter():
    def bytes_in_a_second(size, stride):
        return 1 / MACHINE.exchange_seconds(1, size, stride)

    assert MACHINE.exchange_seconds(1, 1, 1) == 0
    assert bytes_in_a_second(8, 1) == pytest.approx(MACHINE.link * 8 / 7)
    assert bytes_in_a_second(64, 1) == pytest.approx(45e9 * 64 / 56)  # eight of 64 are near
    assert bytes_in_a_second(4, 4) == pytest.approx(45e9 * 4 / 2)
    assert bytes_in_a_second(2, 8) == pytest.approx(45e9 * 2)


def test_pipelines_wait_and_more_gpus_are_faster():
    def seconds(parallel, microbatches):
        workload = replace(WORKLOAD, microbatches=microbatches)
        return step_time(
            EAGLE, parallel, 1, workload, mean_tiles=0, sum_squared_lengths=32768**2, machine=MACHINE
        )

    few, many = seconds(layout(pp=4), 4), seconds(layout(pp=4), 64)
    assert few.pipeline / few.total > 4 * many.pipeline / many.total
    assert seconds(layout(pp=4, vpp=7), 4).pipeline < few.pipeline
    assert seconds(layout(cp=2), 4).total < seconds(layout(), 4).total
    assert seconds(layout(tp=4), 4).tensor_parallel > 0 == seconds(layout(cp=4), 4).tensor_parallel


def test_ranking_is_fastest_first_and_deterministic():
    first, again = plans(), plans()
    assert [plan.parallel for plan in first.legal] == [plan.parallel for plan in again.legal]
    times = [plan.time.total for plan in first.fitting]
    assert times and times == sorted(times)
    fits = [plan.fits for plan in first.legal]
    assert fits == sorted(fits, reverse=True)
    assert len({repr(plan.parallel) for plan in first.legal}) == len(first.legal)
    for plan in first.legal:
        assert plan.parallel.model_parallel_size * plan.data_parallel_size == 8
        assert 0 < plan.time.mfu < 0.8


def test_illegal_layouts_are_refused_with_the_rule():
    refused = plans().refused
    reason = next(reason for reason in refused if "tensor_model_parallel_size 8" in reason)
    assert reason.endswith("does not divide the 28 query heads of the language model: choose 1, 2 or 4")
    batches = plans(8, 80e9, "training.global_batch_size=6").refused
    assert any("training.global_batch_size is 6" in reason for reason in batches)


EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 4096}


def test_layouts_of_a_model_with_experts():
    """Every size that divides experts and ranks, with whole experts; TP comes with sequence parallelism. More
    ranks hold less of them and send more."""
    overrides = "model.text.model_type=qwen3_moe", f"model.text.experts={EXPERTS}"
    found = [plan for plan in plans(8, 140e9, *overrides).legal if plan.parallel.context_parallel_size == 2]
    assert {plan.parallel.expert_model_parallel_size for plan in found} == {1, 2, 4, 8}
    for plan in found:
        parallel = plan.parallel
        assert parallel.expert_tensor_parallel_size == 1
        assert parallel.sequence_parallel == (parallel.tensor_model_parallel_size > 1)
    plain = {plan.parallel.expert_model_parallel_size: plan for plan in found if is_plain(plan.parallel)}
    expert = 28 * 16 * 3 * 3584 * 4096
    for size in (2, 4, 8):
        less = 2 * (expert - expert // size)
        assert plain[1].memory.weights - plain[size].memory.weights == less
        assert plain[1].memory.gradients - plain[size].memory.gradients == 2 * less
        # However divided, all ranks together hold each state once.
        assert plain[size].memory.optimizer == plain[1].memory.optimizer
    sent = [plain[size].time.expert_parallel for size in (1, 2, 4, 8)]
    rows = 16384 * 4 * 3584 * 2  # of a rank, four times a layer and microbatch
    assert sent[0] == 0
    assert sent[3] == pytest.approx(28 * 4 * rows * 7 / 8 / MACHINE.bandwidth(8, 1) * plain[8].microbatches)
    assert sent == sorted(sent)


def is_plain(parallel):
    return (parallel.model_parallel_size, parallel.ulysses_parallel_size, parallel.vision_sharding) == (
        2,
        1,
        "cp",
    )


def test_nothing_fits():
    """The smallest comes first, and its limit says which memory is too much."""
    found = plans(gpus=1)
    assert not found.fitting
    assert found.legal[0].limit.startswith("memory: activations 154 GB")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "0"), "--gpus is 0"),
        (
            ("--gpu", "H100 PCIe"),
            "there is no GPU 'H100 PCIe' in the table .*: choose a100, .*h100-pcie, .*gb300",
        ),
        (("--gpu-memory", "3"), "--gpu-memory is 3 GB: must be above the 4 GB"),
        (("--gpu-memory", "nan"), "--gpu-memory is nan GB: must be above the 4 GB"),
        (("--length", "0"), "data.length is 0"),
        (("--global-batch-size", "0"), "training.global_batch_size is 0: must lie between 1"),
        (("--top", "0"), "--top is 0"),
        (("--length", "32769", "data.length=32769", "--gpus", "3"), None),
        (("--rehearse", "--gpu", "l4"), "not a GPU that can be rehearsed: choose a100, l40s, h100"),
        (("--rehearse", "--tiles", "3"), "--rehearse takes the data's tiles, or made-up packs"),
        (("layers.attention=flash3", "--gpu", "b200"), "no speed is known for it on NVIDIA B200"),
        (("layers.attention=reference",), "choose auto or cudnn or flash or flash3"),
        (("model.preset=tiny",), "takes its vocabulary from data"),
        (("model=3",), "model: expected a mapping"),
        (("--tiles", "200"), "200 tiles of 256 tokens do not fit a pack of 32768 tokens: at most 128"),
        (("--json", "/nowhere/plan.json"), "cannot write here"),
    ],
)
def test_the_tool_refuses_in_one_line(arguments, message, monkeypatch, capsys):
    if message is None:  # an odd length is legal without context parallelism
        assert "layouts fit" in run_tool(monkeypatch, capsys, *arguments)
        return
    with pytest.raises(UserError, match=message) as refusal:
        run_tool(monkeypatch, capsys, *arguments)
    assert "\n" not in str(refusal.value)


def test_the_table_of_gpus_is_the_machine(monkeypatch, capsys):
    """Peak, memory and links by name, of which a share is attained; MFU is of the GPU's peak."""
    for name, tflops, bandwidth, link in (
        ("a100", 312, 2.039e12, 300e9),
        ("NVIDIA H100 PCIe", 756, 2.0e12, 64e9),
        ("H800", 989, 3.35e12, 200e9),
        ("b200", 2250, 7.7e12, 900e9),
    ):
        machine = Machine.of(find_gpu(name), gpus_per_node=4)
        assert machine.peak == tflops * 1e12
        assert (machine.memory, machine.bandwidth(4, 1)) == (0.85 * bandwidth, 0.8 * link)
        assert machine.attention_backward < machine.attention < machine.gemm < 0.85 * machine.peak
        assert machine.bandwidth(2, 4) == 45e9
    printed = run_tool(monkeypatch, capsys, "--gpu", "b200", "--top", "1")
    assert printed.startswith("8 x NVIDIA B200 with 180 GB, packs of 32,768 tokens")
    times = {}
    for precision in ("bf16", "fp32"):
        workload = replace(WORKLOAD, precision=precision)
        times[precision] = step_time(
            EAGLE, layout(), 1, workload, mean_tiles=0, sum_squared_lengths=32768**2, machine=MACHINE
        )
    flops = training_flops(EAGLE, tokens=32768, sum_squared_lengths=32768**2, tiles=0).total
    bf16 = times["bf16"]
    assert bf16.mfu == pytest.approx(WORKLOAD.microbatches * flops / bf16.total / 989e12)
    assert times["fp32"].mfu is None  # the table's peak is not that of fp32
    table = run_tool(monkeypatch, capsys, "--top", "1", "training.precision=fp32").split("\n\n")[1]
    assert table.splitlines()[1].split()[13] == "-"


def test_every_rate_is_possible_and_has_a_source():
    """Of the peak at most, the best shapes above a whole step, every backend's kernel on every type."""
    assert set(rates.RATES) == {"h100", "h100-pcie", "h200", "b200", "a100", "l40s"}
    for name, row in rates.RATES.items():
        gpu, figures = GPUS[name], [row.multiprocessors, row.matmul, row.sustained, row.memory]
        figures += [row.link, row.network]
        kernels = [figure for rate in row.attention.values() for figure in (rate.forward, rate.backward)]
        assert all(len(figure.source) > 5 and figure.value > 0 for figure in figures + kernels)
        assert row.matmul.value < 0.9 * gpu.peak and row.memory.value < 1 and row.link.value < 1
        assert all(figure.value < row.matmul.value for figure in kernels)
        assert all(rate.backward.value < rate.forward.value for rate in row.attention.values())
        assert Machine.of(gpu).gemm == row.sustained.value * row.matmul.value
    for gpu in GPUS.values():  # others attain shares of their own peak
        assert Machine.of(gpu).gemm < 0.85 * gpu.peak and Machine.of(gpu).attention < Machine.of(gpu).gemm
    fa2, fa3 = (Machine.of(GPUS["h100"], attention=name) for name in ("torch_varlen", "flash3"))
    assert fa3.attention > 1.5 * fa2.attention and fa3.kernel != fa2.kernel == Machine.of(GPUS["h100"]).kernel
    times = {}
    for machine in (fa2, fa3):
        times[machine.kernel] = step_time(
            EAGLE, layout(), 1, WORKLOAD, mean_tiles=0, sum_squared_lengths=32768**2, machine=machine
        )
    forward = training_flops(EAGLE, tokens=0, sum_squared_lengths=32768**2, tiles=0, trainable=())
    executed = WORKLOAD.microbatches * forward.language_attention
    expected = executed / 370e12 + 2.5 * executed / 322e12
    assert times["flash"].attention == pytest.approx(expected)
    assert times["flash3"].attention < 0.6 * expected and times["flash3"].vision == times["flash"].vision


def test_a_plan_of_adapters(monkeypatch, capsys):
    """Adapters' gradients and states are small, what the layers keep is not; the report says what trains."""
    sizes = {}
    for lora in (None, LoraConfig(rank=16)):
        workload = replace(WORKLOAD, lora=lora)
        parts = peak_memory(EAGLE, layout(tp=4), 16, workload, 0)
        sizes[lora is None] = parts
    whole, adapted = sizes[True], sizes[False]
    language = count_parameters(
        PackShapes(EAGLE, layout(tp=4), 32768), StageShapes.of(PackShapes(EAGLE, layout(tp=4), 32768), 0)
    ).language
    assert whole.gradients - adapted.gradients == pytest.approx(4 * language, rel=0.02)
    assert adapted.weights > whole.weights and adapted.activations > 0.95 * whole.activations
    printed = run_tool(monkeypatch, capsys, "--top", "1", "lora.rank=16")
    assert "the language model by adapters of rank 16" in printed and "layouts fit" in printed
    assert "rates: matrix products 632 of 989 TFLOP/s, attention (auto) 370 forward" in printed


def test_the_tool_prints_a_table_and_writes_json(monkeypatch, capsys, tmp_path):
    printed = run_tool(monkeypatch, capsys, "--top", "3", "--json", str(tmp_path / "plan.json"))
    lines = printed.splitlines()
    table = lines[lines.index("") + 1 :][:4]
    assert [line.split()[0] for line in table] == ["TP", "1", "2", "3"]
    assert "First: " in printed and "choose 1, 2 or 4" in printed
    written = json.loads((tmp_path / "plan.json").read_text())
    assert "positions: max_position_embeddings 131,072" in lines
    assert written["max_position_embeddings"] == 131072
    best = written["layouts"][0]
    assert best["fits"] and best["memory"]["total"] < 137e9
    assert sum(refusal["layouts"] for refusal in written["refused"]) > 0


def run_tool(monkeypatch, capsys, *arguments) -> str:
    command = ["plan.py", "--preset", "eagle2.5-8b", "--gpus", "8", "--gpu", "h200", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(REPO / "tools" / "plan.py"))["main"]()
    return capsys.readouterr().out
