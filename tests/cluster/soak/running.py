"""A seed's run: the job, what it has logged so far, and how it gets over one fault after the other."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from megatron_eagle.checkpoint import has_checkpoint, read_train_state
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.files import read_records
from megatron_eagle.training.monitoring.metrics import (
    EVENTS_FILE,
    METRICS_FILE,
    read_events,
)
from tests.cluster.slurm import Slurm
from tests.cluster.soak.faults import DOING, Effect
from tests.cluster.soak.ledger import LOGS, End, Head, Suffered, add, seed_folder
from tests.cluster.soak.schedule import Fault
from tests.data.helpers import conversation, make_store, make_tokenizer
from tests.paths import REPO

TRAIN = REPO / "examples" / "slurm" / "train.sbatch"
SAVES_EVERY, BATCH, LENGTH, SAMPLES = 4, 4, 256, 120
NODES, PROCESSES = 4, 2  # of the cluster; of the job, where so many nodes are free
PATIENCE = 600.0  # seconds without anything new, after which a run is lost
TOLD = re.compile(
    "not responding|failure of node|returned to service|slurmd started|[Rr]equeuing|urgent|state set to"
)
LAST_STEPS = 12  # after the last fault


class LostError(Exception):
    """The run would need a human."""


def write_config(folder: Path, run: Path) -> Path:
    """A run's file and its data: samples of which no two are alike, so that a loss tells them apart."""
    records = [
        conversation(f"Number {k}", " ".join(f"{k * j % 97}" for j in range(k % 7 + 2)))
        for k in range(SAMPLES)
    ]
    data = make_store(folder / "data", make_tokenizer(folder / "data" / "tokenizer"), records, (LENGTH,))
    write_packs(data, LENGTH, seed=0)
    sections = {
        "model": {"preset": "tiny", "vision": {"image_size": 28, "patch_size": 14}},
        "data": {"path": str(data), "length": LENGTH},
        "training": {"train_iterations": 100_000, "global_batch_size": BATCH, "precision": "fp32"},
        "checkpoint": {
            "path": str(run),
            "save_interval": SAVES_EVERY,
            "keep_last": 2,
            "max_failed_saves": 1000,
        },
        "resilience": {"heartbeat_seconds": 1, "hang_minutes": 0.5},
        "logging": {"progress": False, "tensorboard": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(sections))
    return folder / "run.yaml"


class SoakRun:
    """A job that has been submitted, and what it has come to. A `faults.Victim`."""

    def __init__(self, slurm: Slurm, config: Path) -> None:
        self.slurm, self._config = slurm, config
        self._run = Path(yaml.safe_load(config.read_text())["checkpoint"]["path"])
        self.logs = self._run / LOGS
        self._hurried: set[int] = set()  # requeues
        self._looked, self._moved, self._state = 0.0, time.monotonic(), (0, 0, "")
        options = ("--gpus-per-node=0", f"--nodes=1-{PROCESSES}", "--time=8:00:00")
        self.job = slurm.submit(TRAIN, str(config), options=options)

    def iteration(self) -> int:
        """The last one that is logged."""
        lines = read_records(self.logs / METRICS_FILE)
        return int(lines[-1]["iteration"]) if lines else 0

    def saved(self) -> int:
        """Iteration of the latest checkpoint."""
        with suppress(Exception):  # it is being replaced
            return read_train_state(self._run).iteration if has_checkpoint(self._run) else 0
        return 0

    def events(self) -> list[dict[str, Any]]:
        """All so far."""
        return read_events(self.logs / EVENTS_FILE)

    def said(self) -> str:
        return self.slurm.output(self.job)

    def _history(self) -> list[list[str]]:
        """What Slurm has told so far, of nodes and requeues: the lines of each of its logs."""
        files = [self.slurm.folder / f"{name}.log" for name in ("slurmctld", *self.slurm.names)]
        texts = [file.read_text(errors="replace") for file in files]
        return [[line for line in text.splitlines() if TOLD.search(line)] for text in texts]

    def requeues(self) -> int:
        return int(self.slurm.job(self.job)["Restarts"])

    def wait(self, true: Callable[[], bool], what: str) -> None:
        """Return when it is true.

        A job that waits in the queue is only spared the two minutes that Slurm lets it wait.

        Raises:
            LostError: the job has ended, or nothing of it has moved, or it is not true, for `PATIENCE`.
        """
        began = time.monotonic()
        while True:
            if time.monotonic() - self._looked > 1:
                self._look(what)
            if true():
                return
            if time.monotonic() - began > PATIENCE:
                raise LostError(f"{what} was awaited for {PATIENCE:g} s")
            time.sleep(0.1)

    def suffer(self, fault: Fault) -> Suffered:
        """Let it have the fault, when it is so far, and wait until it trains and saves again."""
        begin = self.iteration() + fault.after
        self.wait(lambda: self.iteration() >= begin, f"iteration {begin}")
        before, saved, at = self.events(), self.saved(), self.iteration()
        requeues = self.requeues()
        history, started, place, why, seconds = self._history(), time.monotonic(), "", "", None
        effect = Effect()
        try:
            with DOING[fault.kind](self, fault) as (place, effect):
                top = self._wait_for_effect(effect, before, at, requeues)
                self.wait(lambda: self.iteration() > top, f"an iteration after {top}")
                seconds = round(time.monotonic() - started, 1)
                self.wait(lambda: self.saved() > saved, f"a checkpoint after {saved}")
            self.wait(self._whole, "all nodes are there again")
        except LostError as lost:
            why = str(lost)
        new = [event for event in self.events() if event not in before]
        return Suffered(
            number=fault.number,
            kind=fault.kind,
            brief=fault.brief,
            place=place,
            iteration=at,
            recovered=not why,
            why=why,
            seconds=seconds,
            repeated=sum(event.get("repeated", 0) for event in new),
            passed=effect.passed,
            events=new,
            history=[
                line for old, now in zip(history, self._history(), strict=True) for line in now[len(old) :]
            ],
        )

    def end(self) -> None:
        """Let the job end by itself, a few iterations from now.

        Raises:
            LostError: it does not.
        """
        sections = yaml.safe_load(self._config.read_text())
        sections["training"]["stop_at_iteration"] = self.iteration() + LAST_STEPS
        self._config.write_text(yaml.safe_dump(sections))
        self.slurm.call("scontrol", "requeue", str(self.job))
        self.wait(lambda: self._state[2] == "COMPLETED", "the job ends")

    def _wait_for_effect(self, effect: Effect, before: list[dict[str, Any]], at: int, requeues: int) -> int:
        """The highest iteration that was logged before the run told of its fault."""
        top = at

        def told() -> bool:
            nonlocal top
            top = max(top, self.iteration())
            found = [event for event in self.events() if event not in before]
            return all(any(_fits(event, kind, effect, requeues) for event in found) for kind in effect.events)

        self.wait(told, f"an event {effect}")
        return top

    def _look(self, what: str) -> None:
        job = self.slurm.job(self.job)
        self._looked, restarts = time.monotonic(), int(job["Restarts"])
        state = (self.iteration(), restarts, job["JobState"])
        if state != self._state:
            self._state, self._moved = state, time.monotonic()
        if job["JobState"] in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"):
            raise LostError(f"the job is {job['JobState']}, {what} was awaited")
        if time.monotonic() - self._moved > PATIENCE:
            raise LostError(f"nothing has moved for {PATIENCE:g} s ({job}), {what} was awaited")
        if job["JobState"] == "PENDING" and restarts and restarts not in self._hurried:
            self._hurried.add(restarts)
            # Not in the second in which it ended, which nodes take for the job that they are to kill.
            self.slurm.call("scontrol", "update", f"JobId={self.job}", "StartTime=now+2", check=False)

    def _whole(self) -> bool:
        words = ("sinfo", "-h", "-N", "-p", "main", "-t", "idle,alloc,mix,comp,drain,drng", "-o", "%N %t")
        lines = self.slurm.call(*words).stdout.splitlines()
        return sum("*" not in line for line in lines) == len(self.slurm.names)


def _fits(event: dict[str, Any], kind: str, effect: Effect, requeues: int) -> bool:
    if event["event"] != kind or kind != "resumed":
        return bool(event["event"] == kind)
    return event["processes"] == (effect.processes or event["processes"]) and (
        event["requeues"] > requeues or not effect.requeued
    )


def soak(
    folder: Path, seed: int, faults: Iterable[Fault], minutes: float, say: Callable[[str], None]
) -> Path:
    """Let a new run suffer faults; returns its folder, with ledger and logs.

    Args:
        faults: the schedule of the seed.
        minutes: after which no fault is added.
    """
    place = seed_folder(folder, seed).absolute()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with Slurm(place / "slurm", NODES) as slurm:
        add(place, Head(seed, commit(), _version(), f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"))
        slurm.environment |= settings(place)
        run, began = SoakRun(slurm, write_config(place, slurm.disk / "run")), time.monotonic()
        why = ""
        try:
            run.wait(lambda: run.saved() > 0, "the first checkpoint")
            for fault in faults:
                if time.monotonic() - began > 60 * minutes:
                    break
                suffered = run.suffer(fault)
                add(place, suffered)
                say(_line(seed, suffered))
                if not suffered.recovered:
                    raise LostError(suffered.why)
            run.end()
        except LostError as lost:
            why = str(lost)
            say(f"seed {seed}: LOST: {why}")
        finally:
            if run.logs.exists():
                shutil.copytree(run.logs, place / LOGS, dirs_exist_ok=True)
            slurm.call("scancel", "--user=root", check=False)
        add(place, End(round((time.monotonic() - began) / 60, 1), why))
    return place


def settings(place: Path) -> dict[str, str]:
    """What jobs are given."""
    return {
        "REPO": str(REPO),
        "PYTHON": sys.executable,
        "RANK_LOGS": str(place / "ranks"),
        "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}",
        "PROCESSES": "1",
        "RDZV_SECONDS": "60",
        "MAX_REQUEUES": "1000",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }


def commit() -> str:
    """Of the tree, with a word on its changes."""
    git = ["git", "-C", str(REPO)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout
    return head.strip() + (" with changes" if changed.strip() else "")


def _version() -> str:
    return subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True).stdout.strip()


def _line(seed: int, suffered: Suffered) -> str:
    kind = f"{suffered.kind}{' for a moment' if suffered.brief else ''} ({suffered.place})"
    if not suffered.recovered:
        return f"seed {seed}, fault {suffered.number}: {kind} at {suffered.iteration}: LOST: {suffered.why}"
    became = f"next step after {suffered.seconds} s, {suffered.repeated} iterations repeated"
    return f"seed {seed}, fault {suffered.number}: {kind} at iteration {suffered.iteration}: {became}"
