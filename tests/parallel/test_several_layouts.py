"""One process, several layouts: nothing of a layout outlives it, and the next one computes what it should."""

import contextlib
import importlib.util
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from megatron.core import parallel_state

from megatron_eagle.runtime import parallel
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from megatron_eagle.training import failed_media
from tests.parallel.harness import launch

PARALLEL = [
    {"context_parallel_size": 2, "ulysses_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    {},
]


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


def refuse(*_, **__) -> None:
    raise RuntimeError("an error inside")


@contextlib.contextmanager
def megatrons_own_end():
    """`model_parallel` as it was: at the end Megatron's `destroy_model_parallel`, which does not know all."""
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def enter_and_leave(layout: dict) -> None:
    """With the group for tensors on the host that a run makes where the default backend is NCCL."""
    on_nccl = patch.object(failed_media.dist, "get_backend", return_value="nccl")
    with model_parallel(ParallelConfig(**layout)), on_nccl:
        failed_media.host_group()


def fail_inside(layout: dict) -> None:
    with contextlib.suppress(RuntimeError), model_parallel(ParallelConfig(**layout)):
        refuse()


def fail_half_way(layout: dict) -> None:
    """The groups exist, the rest cannot be made."""
    with (
        contextlib.suppress(RuntimeError),
        patch.object(parallel, "model_parallel_cuda_manual_seed", refuse),
        model_parallel(ParallelConfig(**layout)),
    ):
        pass


def left_by_each() -> list[tuple[str, dict, dict[str, str]]]:
    """On each rank: what is left of every layout, after every way to leave it."""
    found = [("at the start", {}, left_behind())]
    for layout in PARALLEL:
        for use in (enter_and_leave, fail_inside, fail_half_way):
            use(layout)
            found.append((use.__name__, layout, left_behind()))
    return found


def test_megatron_and_torch_are_as_before():
    for found in launch(left_by_each, 2):
        assert len(found) == 1 + 3 * len(PARALLEL)
        assert [entry for entry in found if entry[2]] == []


def left_by_megatrons_own_end() -> dict[str, str]:
    with (
        patch.object(parallel, "_globals_restored", megatrons_own_end),
        patch.object(parallel, "_groups_destroyed", contextlib.nullcontext),
    ):
        enter_and_leave(PARALLEL[0])
    return left_behind()


def test_what_megatrons_own_end_leaves_is_noticed():
    found = launch(left_by_megatrons_own_end, 2)[0]
    assert {"_HIERARCHICAL_CONTEXT_PARALLEL_GROUPS", "_PIPELINE_GLOBAL_RANKS", "groups"} <= found.keys()
    assert len(found) == 10 and int(found["groups"]) > 20


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
