"""A past step again: the logged loss from its samples, their gradients, under any layout; what is refused."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from megatron.core.distributed import DistributedDataParallel

from megatron_eagle.checkpoint import TrainState, read_train_state
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.device import detect_device
from megatron_eagle.runtime.parallel import model_parallel
from megatron_eagle.training.monitoring.metrics import read_steps
from megatron_eagle.training.optimizer import wrap_models
from megatron_eagle.training.replay import replay as replaying
from megatron_eagle.training.replay import sample_losses
from megatron_eagle.training.replay.page import replay_page
from megatron_eagle.training.replay.replay import Replay, measure_losses, prepare
from megatron_eagle.training.schedule import build_batch, run_schedule
from megatron_eagle.training.start import start_models
from tests.data.inspection.test_preview import parsed
from tests.parallel.harness import launch
from tests.parallel.real_runs import LENGTH, train_cells, write_mixture, write_run
from tests.training.test_training import train_main

TOLERANCE = 1e-5
LEFT_OUT = {2: [0]}  # samples whose media failed, by iteration
SKIPPED = 4
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
CP2, VPP2 = {"context_parallel_size": 2}, {"virtual_pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True, "vision_sharding": "cp_tp"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """`run`: five steps, each saved. The second lost a sample, the fourth was skipped; from the fourth on,
    after a resume, a batch has one pack in place of two."""
    folder = tmp_path_factory.mktemp("replay")
    write_run(
        folder / "run.yaml",
        write_mixture(folder / "data"),
        data={"seed": 5},  # text, pictures and a clip in the second batch
        training={"global_batch_size": 2, "train_iterations": 5},
        checkpoint={"save_interval": 1},
    )
    faults = [
        *({"kind": "bad_media", "iteration": i, "samples": samples} for i, samples in LEFT_OUT.items()),
        {"kind": "nan", "iteration": SKIPPED},
    ]
    settings = ["resilience.on_nonfinite=skip"]
    cells = [
        ([*settings, "training.stop_at_iteration=3"], faults),
        ([*settings, "training.global_batch_size=1"], faults),
    ]
    launch(train_cells, 1, str(folder / "run.yaml"), 1, cells)
    return folder


@pytest.fixture(scope="module")
def run(made) -> Path:
    return made / "run"


def ask(run: str, questions: list[tuple[int, str, list[str]]]) -> list[dict]:
    """On each rank: replays of iterations under checkpoints with overrides, as plain values."""
    world_size = torch.distributed.get_world_size()
    found = []
    for iteration, checkpoint, overrides in questions:
        prepared = prepare(run, iteration, checkpoint=checkpoint, overrides=overrides, world_size=world_size)
        replay = measure_losses(prepared)
        found.append(
            {
                "exact": replay.weights.exact,
                "asked": replay.weights.iteration,
                "total": replay.total,
                "off": replay.off,
                "verdict": replay.verdict[0],
                "samples": {s.number: (s.loss, s.grad_norm) for s in replay.samples},
                "order": [s.number for s in replay.samples],
            }
        )
    return found


def ask_once(run: Path, *questions: tuple[int, Path, list[str]], world_size: int = 1) -> list[dict]:
    return launch(ask, world_size, str(run), [(i, str(c), o) for i, c, o in questions])[0]


@pytest.fixture(scope="module")
def replays(run) -> dict[str | int, dict]:
    """Of one process, by iteration, under the checkpoints of the run; `other`: the third step under a later
    one."""
    iterations = (2, 3, 5)
    found = ask_once(run, *((i, run, []) for i in iterations), (3, run / "iter_0000005", []))
    return dict(zip((*iterations, "other"), found, strict=True))


def test_the_samples_add_up_to_the_logged_loss(run, replays):
    steps = {step.iteration: step for step in read_steps(run / "logs" / "metrics.jsonl")}
    for iteration in steps.keys() & replays.keys():
        found = replays[iteration]
        assert found["exact"]
        assert found["total"] == pytest.approx(steps[iteration].loss, rel=1e-6)
        assert found["off"] <= 1e-6 and "the logged loss (" in found["verdict"]
        losses = [found["samples"][number][0] for number in found["order"]]
        there = [loss for loss in losses if loss is not None]
        assert there == sorted(there, reverse=True), "the highest first"
        assert losses[len(there) :] == [None] * len(LEFT_OUT.get(iteration, ())), "then those left out"
    assert replays[5]["asked"] == 3, "the skipped step left its weights alone"
    assert len(replays[3]["samples"]) > len(replays[5]["samples"]), "the batch became smaller"


def test_other_weights_are_marked(run, replays):
    other = replays["other"]
    assert not other["exact"] and other["asked"] == 5 and other["off"] is None
    assert "OTHER WEIGHTS" in other["verdict"] and other["total"] < replays[3]["total"]
    # The first step began with fresh weights that nobody saved: the latest ones are asked.
    first = prepare(run, 1, checkpoint=run).weights
    assert (first.iteration, first.exact) == (5, False)


def test_a_checkpoint_of_another_run_is_not_the_steps(run, tmp_path):
    """It is of the same iteration, and has read as many packs: its losses tell it from a copy."""
    copied = shutil.copytree(run, tmp_path / "copied", ignore=shutil.ignore_patterns("logs"))
    assert prepare(run, 3, checkpoint=copied).weights.exact
    file = copied / "iter_0000002" / "state.json"
    state = json.loads(file.read_text())
    state["recent_losses"][-1] *= 1.0001
    file.write_text(json.dumps(state))
    assert not prepare(run, 3, checkpoint=copied / "iter_0000002").weights.exact


def test_a_sum_that_is_not_the_logged_loss_is_marked(run):
    prepared = prepare(run, 3, checkpoint=run)
    samples = [replace(sample, loss=1.0) for sample in prepared.samples]
    words, wrong = replace(prepared, samples=samples).verdict
    assert wrong and words.startswith("NOT the logged loss: ")


def gradients(run: str, iteration: int) -> dict:
    """In one process: gradients of the batch and of each sample, the latter from its own pack and, with the
    weights of the others taken away, from the batch's."""
    prepared = prepare(run, iteration, checkpoint=run)
    config, cpu = prepared.weights.config, torch.device("cpu")
    with model_parallel(config.parallel) as mesh:
        device = detect_device()
        loader = replaying._open(config, prepared.step, mesh, device)
        source, weights = config.checkpoint.load, prepared.weights
        models = start_models(config, mesh, device, source, load=True, iteration=weights.iteration)
        wrapped = wrap_models(models, across_replicas=False)

        def grads() -> torch.Tensor:
            return torch.cat([p.main_grad.flatten().double() for p in models[0].parameters()])

        def backward(packs) -> torch.Tensor:
            wrapped[0].zero_grad_buffer()
            run_schedule(wrapped, mesh, packs, partial(build_batch, cpu), length=LENGTH)
            return grads()

        batch = loader.step(prepared.step.first_pack)
        if prepared.step.left_out:
            batch = loader.leave_out(batch, set(prepared.step.left_out))
        whole, total, worst, norms = backward(batch.microbatches), 0.0, 0.0, {}
        for number, _ in sample_losses.backward_each(
            wrapped, mesh, loader, batch, prepared.step.left_out, cpu
        ):
            norms[number] = sample_losses.gradient_norm(wrapped, mesh)
            own = grads()
            total = total + own
            assert norms[number] == pytest.approx(own.norm().item(), rel=1e-9)
            [(pack, sample)] = [(p, s) for p in batch.microbatches for s in p.samples if s.number == number]
            weights = torch.zeros_like(pack.loss_weights)
            weights[sample.start : sample.end] = pack.loss_weights[sample.start : sample.end]
            in_pack = backward([replace(pack, loss_weights=weights)])
            worst = max(worst, ((in_pack - own).abs().max() / own.abs().max()).item())
        loader.close()
    return {
        "sum": ((total - whole).abs().max() / whole.abs().max()).item(),
        "alone": worst,
        "norm": whole.norm().item(),
        "norms": norms,
    }


def test_gradients_of_samples_add_up_to_that_of_the_batch(run, replays):
    """The sample alone has the gradient that its weights alone have in the batch; the norm of the sum is the
    logged one."""
    steps = {step.iteration: step for step in read_steps(run / "logs" / "metrics.jsonl")}
    [found] = launch(gradients, 1, str(run), 2)
    assert found["sum"] < TOLERANCE and found["alone"] < TOLERANCE
    assert found["norm"] == pytest.approx(steps[2].grad_norm, rel=TOLERANCE)
    assert {n: norm for n, (_, norm) in replays[2]["samples"].items() if norm} == pytest.approx(
        found["norms"]
    )


def overrides(parallel: dict, *more: str) -> list[str]:
    return [f"parallel={json.dumps(parallel)}", *more]


def check_equal(found: dict, expected: dict) -> None:
    assert found["samples"].keys() == expected["samples"].keys()
    for number, values in expected["samples"].items():
        assert found["samples"][number] == (pytest.approx(values, rel=TOLERANCE) if values[0] else values)


@pytest.mark.slow
def test_layouts(run, replays):
    cells = [
        (2, run, overrides(TP2 | SP | CP2, "layers.loss=fused")),
        (3, run, overrides(PP2 | VPP2)),
        (2, run, overrides(CP2, "data.packs_per_sequence=2")),
    ]
    for found, iteration in zip(ask_once(run, *cells, world_size=4), (2, 3, 2), strict=True):
        check_equal(found, replays[iteration])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (2, overrides({})),
        (2, overrides(TP2, "layers.loss=fused")),
        (4, overrides({"pipeline_model_parallel_size": 4})),
        (4, overrides({"context_parallel_size": 4, "context_parallel_layout": "zigzag"})),
        (4, overrides({"context_parallel_size": 4, "ulysses_parallel_size": 2})),
        (4, overrides(CP2 | {"context_parallel_layout": "zigzag_per_document", "pad_documents": True})),
        (2, overrides(CP2, "recompute.language=offload")),
        (8, overrides(TP2 | SP | PP2 | CP2)),
    ],
    ids=["dp2", "tp2-fused", "pp4", "zigzag", "ulysses", "padded-dp2", "offload", "tp2-sp-pp2-cp2"],
)
def test_more_layouts(run, replays, world_size, settings):
    [found] = ask_once(run, (2, run, settings), world_size=world_size)
    check_equal(found, replays[2])


def _ask_without_sums(*arguments) -> list[dict]:
    """Gradients from the tokens of other context parallel ranks are lost."""
    with patch.object(DistributedDataParallel, "finish_grad_sync"):
        return ask(*arguments)


def test_lost_gradients_are_noticed(run, replays):
    found = launch(_ask_without_sums, 2, str(run), [(3, str(run), overrides(CP2))])[0][0]
    losses, norms = ({n: values[k] for n, values in found["samples"].items()} for k in (0, 1))
    expected = replays[3]["samples"]
    assert losses == pytest.approx({n: values[0] for n, values in expected.items()}, rel=TOLERANCE)
    assert max(abs(norms[n] / expected[n][1] - 1) for n in expected) > 1000 * TOLERANCE


@pytest.fixture(scope="module")
def adapted(made) -> Path:
    """A run of adapters with the encoder frozen, in bf16, that began with the other run's weights."""
    settings = yaml.safe_load((made / "run.yaml").read_text())
    settings |= {"lora": {"rank": 2}, "optimizer": {"lr": 1e-2, "trainable": ["connector", "language"]}}
    settings["training"] |= {"precision": "bf16", "stop_at_iteration": 2}
    settings["checkpoint"] |= {"path": str(made / "adapted"), "load": str(made / "run")}
    (made / "adapted.yaml").write_text(yaml.safe_dump(settings))
    launch(train_cells, 1, str(made / "adapted.yaml"), 1, [([], [])])
    return made / "adapted"


def test_adapters_frozen_parts_and_bf16(made, adapted):
    """A first step is asked under the weights that the run began with; a copied checkpoint does as well."""
    steps = read_steps(adapted / "logs" / "metrics.jsonl")
    copied = shutil.copytree(adapted, made / "copied", ignore=shutil.ignore_patterns("logs"))
    first, second = ask_once(adapted, (1, made / "run", []), (2, copied / "iter_0000001", []))
    for step, found in zip(steps, (first, second), strict=True):
        assert found["exact"] and found["total"] == pytest.approx(step.loss, rel=1e-2)
        assert found["off"] <= 1e-2 and all(norm > 0 for _, norm in found["samples"].values())
        # Of a sum of vectors.
        assert step.grad_norm < sum(norm for _, norm in found["samples"].values()) * 1.01


def test_the_source_of_a_run_may_have_trained_on(made, adapted, monkeypatch):
    """The first step's weights are those of the iteration that the run began from, not of the latest."""
    source, began = made / "run", read_train_state(adapted).started_from
    assert began == read_train_state(source).iteration
    found = prepare(adapted, 1, checkpoint=source).weights
    assert (found.iteration, found.exact) == (began, True)
    assert not prepare(adapted, 1, checkpoint=source / "iter_0000002").weights.exact
    monkeypatch.setattr(replaying, "read_train_state", lambda *_: TrainState(2))  # of an earlier version
    assert not prepare(adapted, 1, checkpoint=source).weights.exact


def test_what_would_change_nothing_is_refused(run, monkeypatch, capsys):
    for name, said in (("data.seed", "data.seed"), ("training.seed", "training")):
        with pytest.raises(UserError, match=f"^{said}: without --checkpoint nothing but data.path can be"):
            command(monkeypatch, capsys, run, "--iteration", 3, f"{name}=4")
    with pytest.raises(UserError, match="--show -5: expected 0 or more"):
        command(monkeypatch, capsys, run, "--iteration", 3, "--show", -5)


def command(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["train.py", "replay", *map(str, arguments)])
    code = train_main()()
    return code, capsys.readouterr().out


def test_from_a_spike_to_its_samples_in_one_command(run, monkeypatch, capsys, tmp_path):
    page = tmp_path / "page.html"
    code, out = command(
        monkeypatch,
        capsys,
        run,
        "--around-spike",
        "--checkpoint",
        run,
        "--output",
        page,
        "data.decode_threads=1",
    )
    assert code == 0 and out.startswith(f"iteration {SKIPPED}: skipped: the loss is nan\n")
    assert "(row " in out and out.endswith(f"written to {page}\n")
    text = parsed(page.read_text()).text
    assert "the logged loss is no finite number" in text
    with pytest.raises(UserError, match="cannot write the page"):
        command(monkeypatch, capsys, run, "--iteration", 3, "--output", tmp_path / "none" / "page.html")
    assert "packs from number" in capsys.readouterr().out, "what was found is printed"
    assert f"Iteration {SKIPPED}" in text and "did not take this step: skipped: the loss is nan" in text


def test_the_page_shows_every_sample(run):
    """Without a checkpoint: no model is built."""
    prepared = prepare(run, 2)
    with patch.object(replaying, "measure_losses", side_effect=AssertionError):
        page = replay_page(prepared, 100)
    seen = parsed(page)
    assert seen.tags.count("tr") - 2 * len(prepared.samples) == 1 + len(prepared.samples)
    for sample in prepared.samples:
        assert f"{sample.file}:{sample.line}" in seen.text and f'id="number-{sample.number}"' in page
    frames = sum(prepared.store[sample.row].n_frames for sample in prepared.samples)
    assert seen.tags.count("img") == frames > 0 and seen.tags.count("svg") > 0
    assert "Data alone: no checkpoint was asked" in seen.text and "mean loss" not in seen.text
    [lost] = [sample for sample in prepared.samples if sample.left_out]
    assert lost.number == LEFT_OUT[2][0] and lost.share == 0 and "Left out of the step: a fault" in seen.text
    assert sum(sample.share for sample in prepared.samples) == pytest.approx(1)
    few = parsed(replay_page(prepared, 2))
    assert f"{len(prepared.samples) - 2} samples are in the table alone" in few.text
    assert few.tags.count("h2") == 2


def refusal(*arguments, **more) -> str:
    with pytest.raises(UserError) as caught:
        prepare(*arguments, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_replayed(made, run, tmp_path):
    assert "there is no iteration 12; it has iterations 1 to 5" in refusal(run, 12)
    assert "no checkpoint of iteration 12; it has those of 1, 2, 3, 4, 5" in refusal(
        run, 3, checkpoint=run / "iter_0000012"
    )
    assert "no such folder" in refusal(run, 3, checkpoint=tmp_path / "none")
    assert "without --checkpoint nothing but data" in refusal(run, 3, overrides=["parallel={}"])
    assert "start a multiple of 2 processes" in refusal(
        run, 3, checkpoint=run, overrides=overrides(TP2), world_size=1
    )
    assert "the data of iteration 3 are not there; data.path=D says where" in refusal(
        run, 3, overrides=[f"data.path={tmp_path / 'gone'}"]
    )
    moved = Path(shutil.copytree(made / "data", tmp_path / "data")) / "store"
    assert isinstance(prepare(run, 3, overrides=[f"data.path={moved}"]), Replay)
    write_packs(moved, LENGTH, seed=1)
    assert "not the data that iteration 3 read (packs " in refusal(run, 3, overrides=[f"data.path={moved}"])
    other = write_mixture(tmp_path / "other", names=("chat", "pictures", "films", "rare"))
    assert "not the data that iteration 3 read (store " in refusal(run, 3, overrides=[f"data.path={other}"])


def refused_media(run: str, iteration: int) -> str:
    try:
        ask(run, [(iteration, run, [])])
    except UserError as error:
        return str(error)
    return ""


def test_media_that_are_gone_by_now(made, run):
    """The page names them; losses would not be those of the step."""
    clip = made / "data" / "v.mp4"
    clip.rename(made / "away")
    try:
        [message] = launch(refused_media, 1, str(run), 2)
        assert "v.mp4" in message and "leave out --checkpoint to see the data alone" in message
        assert "v.mp4" in parsed(replay_page(prepare(run, 2), 100)).text
    finally:
        (made / "away").rename(clip)
