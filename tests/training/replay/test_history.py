"""What an iteration was, out of logs written by hand: its batch, what was left out; where a spike is."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_eagle.data.loading.identity import DataIdentity
from megatron_eagle.errors import UserError
from megatron_eagle.training.monitoring.metrics import StepMetrics
from megatron_eagle.training.replay.history import History

DATA = DataIdentity("data/mix", 64, 0, "square", False, "aa", "bb")


def write(folder: Path, losses: dict[int, float], events: list[dict] = [], **fields) -> Path:  # noqa: B006
    """Logs of a run whose batches have 4 packs, from iteration 4 on 2."""
    logs = folder / "run" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with open(logs / "metrics.jsonl", "w") as file:
        for i, loss in losses.items():
            step = StepMetrics(i, loss, 1.5, 1e-3, 100, 1.0, 0.1, data=DATA.to_dict(), **batch(i))
            file.write(json.dumps({**asdict(step), **fields}) + "\n")
        file.write(json.dumps({"iteration": 3, "evaluation_loss": 9.0}) + "\n")
    (logs / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder / "run"


def batch(iteration: int) -> dict[str, int]:
    late = iteration >= 4
    return {"first_pack": 4 * (iteration - 1) - 2 * max(0, iteration - 4), "packs": 2 if late else 4}


def refused(iteration: int, event: str = "skipped", loss: float | None = None, reason: str = "nan") -> dict:
    record = {"iteration": iteration, "event": event, "reason": reason, "loss": loss, "data": DATA.to_dict()}
    return record | batch(iteration)


def lost(iteration: int, sample: int, of: str = "training") -> dict:
    return {
        "iteration": iteration,
        "event": "failed_media",
        "reason": f"no {sample}",
        "sample": sample,
        "of": of,
    }


def test_each_step_says_which_batch_it_was(tmp_path):
    events = [lost(2, 7), lost(2, 3), lost(3, 5, of="evaluation"), refused(6)]
    history = History(write(tmp_path, {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0, 5: 1.0}, events))
    steps = [history.step(i) for i in range(1, 7)]
    assert [(step.first_pack, step.packs) for step in steps] == [
        (0, 4),
        (4, 4),
        (8, 4),
        (12, 2),
        (14, 2),
        (16, 2),
    ]
    assert steps[1].left_out == {7: "no 7", 3: "no 3"} and steps[2].left_out == {}
    assert (steps[1].loss, steps[1].grad_norm, steps[1].not_taken) == (4.0, 1.5, None)
    assert (steps[5].loss, steps[5].grad_norm, steps[5].not_taken) == (None, None, "skipped: nan")
    assert all(step.data == DATA for step in steps)
    assert History(tmp_path / "run" / "logs").step(1) == steps[0], "the folder of logs does as well"


def test_a_newer_version_s_fields_do_no_harm(tmp_path):
    run = write(tmp_path, {1: 5.0}, data=DATA.to_dict() | {"order": "other"})
    assert History(run).step(1).data == DATA


def test_what_there_is_not(tmp_path):
    run = write(tmp_path, {1: 5.0, 2: 4.0}, [refused(3)])
    with pytest.raises(UserError, match="no iteration 7; it has iterations 1 to 3"):
        History(run).step(7)
    with pytest.raises(UserError, match="no logs of a run"):
        History(tmp_path)
    run = write(
        tmp_path,
        {1: 5.0},
        [{"iteration": 2, "event": "skipped", "reason": "nan", "first_pack": 4}],
        data=None,
    )
    for iteration in (1, 2):
        with pytest.raises(UserError, match="an older version, which did not record its global batch"):
            History(run).step(iteration)


def test_the_spike(tmp_path):
    losses = {1: 9.0, 2: 4.0, 3: 4.1, 4: 8.0, 5: 4.0}
    iteration, reason = History(write(tmp_path, losses)).spike()
    assert iteration == 4 and reason.startswith("the loss jumps to 8.0000, 1.95 times the median before")
    nothing = refused(6, loss=0.0, reason="no sample of this step has weight in the loss")
    assert History(write(tmp_path, losses, [nothing])).spike()[0] == 4
    events = [refused(2, loss=7.0), lost(3, 1), refused(6, "stopped"), nothing | {"iteration": 7}]
    assert History(write(tmp_path, losses, events)).spike() == (6, "stopped: nan")
    with pytest.raises(UserError, match="no jump of the loss to look for in iterations 1 to 1"):
        History(write(tmp_path, {1: 2.0})).spike()


def test_weights_that_the_run_had(tmp_path):
    events = [refused(3), refused(4), refused(6, "stopped")]
    history = History(write(tmp_path, {1: 3.0, 2: 2.0, 5: 1.0}, events))
    had = history.had_weights
    assert had(2, [3.0, 2.0], 4) and had(4, [2.0], 2) and had(5, [9.0, 3.0, 2.0, 1.0], 5)
    assert not had(1, [3.0], 4) and not had(4, [3.0, 2.0], 5) and not had(5, [3.0, 2.0, 1.0], 6), "taken"
    assert not had(4, [3.0, 2.5], 4) and not had(2, [2.5, 2.0], 2) and not had(2, [], 2), "another run's"


def test_weights_before_the_first_step_that_was_taken(tmp_path):
    history = History(write(tmp_path, {2: 3.0}, [refused(1)]))
    assert history.had_weights(1, [], 0) and not history.had_weights(1, [3.0], 0)
