"""One process, several layouts: nothing of a layout outlives it, and the next one computes what it should."""

import contextlib
import importlib.util
import random
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from megatron.core import parallel_state

from megatron_eagle.context_parallel.attention import CoreAttention
from megatron_eagle.context_parallel.reference_attention import ReferenceAttention
from megatron_eagle.model.layers import LayersConfig
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.runtime import parallel
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from megatron_eagle.training.resilience import failed_media
from tests.parallel.cases import LAYOUTS, PACKS, Layout, Outcome, combine, run, tiny_model
from tests.parallel.harness import launch
from tests.parallel.test_lora import run_lora

TOLERANCE = 1e-5  # max |g - ref| / max |ref| per tensor, fp32
OFFLOAD = RecomputeConfig("offload", offload_keep_last=1, swiglu=True)

ULYSSES = {"context_parallel_size": 2, "ulysses_parallel_size": 2}
VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


def at_import() -> ModuleType:
    """Megatron's module as it is when it has just been imported: a copy that nobody has used."""
    spec = importlib.util.find_spec(parallel_state.__name__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def data(module: ModuleType) -> dict[str, object]:
    """What a module holds besides functions, classes, modules and what Python itself puts there."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("__") and not callable(value) and not isinstance(value, ModuleType)
    }


def left_behind() -> dict[str, str]:
    """Globals of `parallel_state` that are not as at import, and the number of torch's groups."""
    now, fresh = data(parallel_state), data(at_import())
    found = {
        name: str(now.get(name)) for name in now.keys() | fresh.keys() if now.get(name) != fresh.get(name)
    }
    groups = len(torch.distributed.distributed_c10d._world.pg_map)
    return found | ({} if groups == 1 else {"groups": str(groups)})


@contextlib.contextmanager
def megatrons_own_end():
    """With `model_parallel` as it was: at its end Megatron's `destroy_model_parallel`, and no more."""

    @contextlib.contextmanager
    def destroyed(module: ModuleType):
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()

    with (
        patch.object(parallel, "_globals_restored", destroyed),
        patch.object(parallel, "_groups_destroyed", contextlib.nullcontext),
    ):
        yield


def enter_and_leave(layout: dict) -> None:
    """With the group for tensors on the host that a run makes where the default backend is NCCL."""
    on_nccl = patch.object(failed_media.dist, "get_backend", return_value="nccl")
    with model_parallel(ParallelConfig(**layout)), on_nccl:
        failed_media.host_group()


def fail_inside(layout: dict) -> None:
    with pytest.raises(RuntimeError), model_parallel(ParallelConfig(**layout)):
        raise RuntimeError("an error inside")


def fail_half_way(layout: dict) -> None:
    """Some of the groups cannot be made."""

    def options(name: str, _) -> None:
        if name == "embd":
            raise RuntimeError("an error while groups are made")

    with (
        pytest.raises(RuntimeError),
        patch.object(parallel_state, "get_nccl_options", options),
        model_parallel(ParallelConfig(**layout)),
    ):
        pass


USES = [
    (enter_and_leave, ULYSSES),
    (fail_inside, ULYSSES),
    (fail_half_way, ULYSSES),
    (enter_and_leave, VPP2),
    (fail_half_way, VPP2),
    (fail_inside, {}),
]


def left_by_each() -> list[dict[str, str]]:
    """On each rank: what is left after every use of a layout, and at the start."""
    found = [left_behind()]
    for use, layout in USES:
        use(layout)
        found.append(left_behind())
    return found


def test_megatron_and_torch_are_as_before():
    for found in launch(left_by_each, 2):
        assert found == [{}] * (1 + len(USES))


def left_by_megatrons_own_end() -> dict[str, str]:
    with megatrons_own_end():
        enter_and_leave(ULYSSES)
    return left_behind()


def test_what_megatrons_own_end_leaves_is_noticed():
    found = launch(left_by_megatrons_own_end, 2)[0]
    assert {"_HIERARCHICAL_CONTEXT_PARALLEL_GROUPS", "_PIPELINE_GLOBAL_RANKS", "groups"} <= found.keys()
    assert int(found["groups"]) > 20


def refusal_of_a_second_one() -> tuple[str, bool]:
    """Inside a layout: the refusal of another, and that the first is untouched by it."""
    with model_parallel(ParallelConfig()):
        before = data(parallel_state)
        with pytest.raises(parallel.UserError) as caught, model_parallel(ParallelConfig()):
            pass
        untouched = data(parallel_state) == before
    return str(caught.value), untouched


def test_a_layout_inside_another_is_refused():
    [(message, untouched)] = launch(refusal_of_a_second_one, 1)
    assert message.startswith("a model-parallel layout is active in this process") and untouched


def compute(kind: str, layout: dict) -> dict:
    """On one rank: the parity case under a layout, with what else a stage may change."""
    if kind == "LoRA":
        return run_lora(layout)
    recompute = {"plain": None, "offload": OFFLOAD, "full": RecomputeConfig("full", "full")}[kind]
    layers = LayersConfig(loss="fused") if kind == "offload" else None
    return run(Layout("", 0, layout), tiny_model(), torch.float32, recompute, layers)


def walk(steps: list[tuple[str, dict]]) -> list[tuple[dict, dict[str, str]]]:
    """On each rank: one layout after the other, and what each has left behind."""
    return [(compute(*step), left_behind()) for step in steps]


def fits(layout: dict, ranks: int) -> bool:
    """Whether `ranks` processes can hold the layout, and share the packs in its way."""
    config = ParallelConfig(**layout)
    if ranks % config.model_parallel_size or len(PACKS) % (ranks // config.model_parallel_size):
        return False
    packs = len(PACKS) * config.model_parallel_size // ranks
    return config.num_model_chunks == 1 or packs % config.pipeline_model_parallel_size == 0


def draw_walk(seed: int, pairs: int, ranks: int) -> list[tuple[str, dict]]:
    """Layouts one after the other, each two of which are a pair: of the parity table's that fit (data
    parallelism takes what is left), one of every combination of axes, and half of the others with Ulysses. A
    fifth has LoRA, a fifth offload."""
    draw, number = random.Random(seed), pairs + 1
    fitting = [cell.parallel for cell in LAYOUTS if fits(cell.parallel, ranks)]
    alike: dict[frozenset, list[dict]] = {}
    for layout in fitting:
        axes = frozenset(name for name in layout if name.endswith(("_size", "sequence_parallel")))
        alike.setdefault(axes, []).append(layout)
    layouts = [draw.choice(same) for same in alike.values()]
    ulysses = [layout for layout in fitting if "ulysses_parallel_size" in layout]
    layouts += draw.choices(ulysses + draw.sample(fitting, len(ulysses)), k=number - len(layouts))
    kinds = draw.sample(["LoRA", "offload", "plain", "plain", "full"] * -(-number // 5), number)
    draw.shuffle(layouts)
    return list(zip(kinds, layouts, strict=True))


@pytest.fixture(scope="module")
def references() -> dict[str, Outcome]:
    """Of one process; activations kept or computed again are no other computation."""
    plain, lora = (combine(launch(compute, 1, kind, {})) for kind in ("plain", "LoRA"))
    return {"plain": plain, "offload": plain, "full": plain, "LoRA": lora}


@pytest.mark.parametrize(
    ("seed", "pairs", "ranks"),
    [
        pytest.param(4, 12, 4, marks=pytest.mark.slow),
        pytest.param(0, 20, 2, marks=pytest.mark.slow),
        pytest.param(2, 20, 4, marks=pytest.mark.slow),
        pytest.param(1, 20, 8, marks=pytest.mark.slow),
    ],
)
def test_the_second_layout_of_a_pair_equals_one_process(seed, pairs, ranks, references):
    steps = draw_walk(seed, pairs, ranks)
    assert {kind for kind, layout in steps if "ulysses_parallel_size" in layout} >= {"LoRA", "offload"}
    of_ranks = launch(walk, ranks, steps, timeout=600)
    for number, (kind, layout) in enumerate(steps):
        results, left = zip(*(found[number] for found in of_ranks), strict=True)
        before = steps[number - 1] if number else None
        error = combine(results).worst(references[kind])
        assert error[0] <= TOLERANCE, f"{kind} {layout} after {before}: {error}"
        assert not any(left), f"{kind} {layout}: {left}"


def after_a_layout_that_stays(first: dict, second: dict) -> dict:
    """On each rank: the second layout, whose attention takes what groups there are, as it once did."""
    make = CoreAttention.__init__

    def trust_the_groups(self, *args, pg_collection, **kwargs):
        make(self, *args, pg_collection=pg_collection, **kwargs)
        self.ulysses_group, self.key_group = pg_collection.hcp or (None, pg_collection.cp)

    with megatrons_own_end(), patch.object(CoreAttention, "__init__", trust_the_groups):
        compute("plain", first)
        return compute("plain", second)


def test_groups_of_the_layout_before_are_noticed(references):
    """The fault that this file is about: a loss that is off by little, by much or not a number."""
    results = launch(after_a_layout_that_stays, 2, ULYSSES, {})
    errors = combine(results, check_replicas=False).errors(references["plain"])
    assert not all(error <= 100 * TOLERANCE for error in errors.values())


def after_an_error(first: dict, second: dict) -> dict:
    """On each rank: the second layout, with adapters, after a first that failed inside a recomputed layer."""
    error = patch.object(ReferenceAttention, "forward", side_effect=RuntimeError("an error inside"))
    with pytest.raises(RuntimeError), error:
        compute("full", first)
    return compute("LoRA", second)


def test_a_layout_after_an_error_equals_one_process(references):
    sequence_parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    results = launch(after_an_error, 2, sequence_parallel, ULYSSES)
    assert combine(results).worst(references["LoRA"])[0] <= TOLERANCE
