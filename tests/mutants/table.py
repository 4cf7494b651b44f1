"""`make parity-mutants`: drops and doubles every collective and scale factor of training, one at a time.

Records which tests run which sites, then runs each mutant against them until one fails. Exits with 1 if a
mutant survives all tests that run it and is not named in `equivalent.yaml`, or if one named there does not
exist or is noticed. `--write` records the table in its card.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import yaml

from tests.mutants import factors
from tests.mutants.mutant import Mutant
from tests.mutants.recording import Recorder
from tests.mutants.sites import ROOTS, SET_UP, short_name
from tests.mutants.trials import Tests, Trial, Trials
from tests.paths import REPO
from tools.benchmarks.report import card_head

CARD = REPO / "examples" / "cards" / "parity_mutants.json"
EQUIVALENT = Path(__file__).with_name("equivalent.yaml")
# Tests of training's numbers. Parity does not see a factor that all layouts share: these files know the right
# numbers from elsewhere.
ABSOLUTE = [
    *(f"tests/kernels/test_{name}.py" for name in ("rms_norm", "linear_cross_entropy")),
    *(
        f"tests/context_parallel/test_{name}.py"
        for name in ("reference_attention", "layout", "context_parallel")
    ),
    *(f"tests/convert/test_{name}.py" for name in ("rotary", "lora", "constants", "trajectory")),
    "tests/model/test_experts.py",
    "tests/data/loading/test_loader.py",
    "tests/training/test_training.py",
]
POOL = [
    *ABSOLUTE,
    *(
        f"tests/parallel/test_{name}.py"
        for name in ("parity", "experts", "families", "steps", "fused_loss", "lora", "parts", "norm")
    ),
    *(f"tests/parallel/test_{name}.py" for name in ("offload", "swiglu_recompute", "store_cells")),
    "tests/parallel/test_dataset_losses.py",
    "tests/training/test_training_loop.py",
    "tests/training/test_evaluation.py",
    "tests/model/test_model.py",
]
# Sources whose scale factors no number of training passes through.
APART = {
    "no part of training": [f"{name}/" for name in ("convert", "evaluation", "inference", "eagle_video")],
    "prepares and divides data, whose tests compare what is written": [
        "data/",
        "hf_model/clips.py",
        "hf_model/grids.py",
    ],
    "plans": ["planning/", "training/preflight.py", "model/flops.py"],
    "reports": [
        f"training/monitoring/{name}.py"
        for name in ("charts", "dataset_report", "heartbeat", "metrics", "report", "profiler", "run_log")
    ]
    + [f"training/monitoring/{name}.py" for name in ("step_meter", "step_totals", "stragglers")],
    "saves and loads": ["checkpoint/"],
}
NOT_APART = ("loading/batch.py", "loss_weights.py")  # of data/
_APART = tuple(f"megatron_eagle/{part}" for parts in APART.values() for part in parts)
ARGUMENTS = [
    "-o",
    "addopts=--import-mode=importlib",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:terminal",
    "-k",
    "not noticed",
    "-m",
    "not gpu and not soak",  # without the negative controls
]
OF_A_FILE = 6  # tests that a mutant is tried on before the others of their file


def record(pool: list[str], output: Path) -> None:
    """Run the pool without mutants and write what `Recorder` found."""
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder))
        with recorder.running():
            pytest.main([*ARGUMENTS, *pool], plugins=[recorder])
    if recorder.result["failed"]:
        raise SystemExit(f"these tests fail without a mutant: {', '.join(recorder.result['failed'])}")
    output.write_text(json.dumps(recorder.result), encoding="utf-8")


def mutants(recorded: dict) -> list[Mutant]:
    """Of everything that was recorded in a training step; of our own sources also what is set up for it."""
    sites = sorted({tuple(row) for rows in recorded["sites"].values() for row in rows})
    found = []
    for kind, site, phase in sites:
        file = factors.file_of(site)
        if kind == "collective" and phase != SET_UP:
            found += [Mutant(kind, site, how) for how in ("dropped", "doubled") if _has(site, how)]
        elif (
            kind == "factor" and not is_apart(file) and (phase != SET_UP or not file.startswith("megatron/"))
        ):
            found += [Mutant(kind, site, how) for how in ("dropped", "doubled")]
    return list(dict.fromkeys(found))


def _has(site: str, how: str) -> bool:
    return how == "dropped" or "_object" not in site.split(" by ")[0]


def is_apart(file: str) -> bool:
    """Whether no number of training passes through the factors of this source."""
    return file.startswith(_APART) and not file.endswith(NOT_APART)


def equivalents() -> dict[str, str]:
    """Mutants that change no number, by name, with the proof."""
    entries = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8"))
    return {mutant: entry["proof"] for entry in entries for mutant in entry["mutants"]}


def exists(site: str) -> bool:
    """Whether the sources have it: a factor by its name, a collective by its call and function."""
    file = factors.file_of(site)
    for root, name in ROOTS.items():
        if file.startswith(name + "/"):
            source = Path(root + file.removeprefix(name)).read_text(encoding="utf-8")
            return site in factors.sites(source, file)
    _, call = site.split(" by ", 1)
    name, call = call.split(" ", 1)
    call, functions = call.rsplit(" in ", 1)
    function = functions.split(" < ")[0].split(" of ")[0].split(".")[-1]
    for root in ROOTS:
        for path in Path(root).rglob(name):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and node.name == function and call in ast.unparse(node):
                    return True
    return False


def not_run(recorded: dict) -> list[str]:
    """Candidates of our sources that no test runs: of GPU backends, for example."""
    ran = {site for rows in recorded["sites"].values() for _, site, _ in rows}
    found = []
    for root, name in ROOTS.items():
        for file in sorted(Path(root).rglob("*.py")) if name != "megatron/core" else ():
            short = short_name(str(file))
            if short is not None and not is_apart(short):
                found += [s for s in factors.sites(file.read_text(encoding="utf-8"), short) if s not in ran]
    return found


def main() -> int:
    """The command line; 1 if a mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", metavar="FILE", type=Path, help="only record, into FILE")
    parser.add_argument("--recorded", metavar="FILE", type=Path, help="take what --record wrote")
    parser.add_argument("--only", metavar="TEXT", default="", help="mutants with TEXT in their name")
    parser.add_argument("--write", action="store_true", help="also record the table in its card")
    options = parser.parse_args()
    if options.record is not None:
        record(POOL, options.record)
        return 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = options.recorded or Path(folder, "recorded.json")
        if options.recorded is None:  # in a process of its own: its ranks' server has changed code
            command = [sys.executable, "-W", "ignore", "-m", "tests.mutants.table", "--record", str(file)]
            if subprocess.run(command, cwd=REPO, check=False).returncode:
                return 1
        recorded = json.loads(file.read_text(encoding="utf-8"))
    seconds = time.monotonic() - start
    tests, named = Tests(recorded), equivalents()
    chosen = [mutant for mutant in mutants(recorded) if options.only in str(mutant)]
    print(f"{len(chosen)} mutants; recorded in {seconds / 60:.1f} minutes", flush=True)
    trials: list[Trial] = []

    def report(trial: Trial) -> None:
        trials.append(trial)
        what = (
            f"{trial.noticed_as} {trial.noticed_by}" if trial.noticed_by else f"SURVIVED {trial.tried} tests"
        )
        print(f"{trial.mutant}\n    {what}", flush=True)
        if trial.noticed_as == "error":
            print("      ", trial.message.splitlines()[-1][:200], flush=True)

    def planned_for(mutant: Mutant) -> list[str]:
        """All tests that run it, the likelier ones first; few for one that changes no number."""
        known, first = str(mutant) in named, ABSOLUTE if mutant.kind == "factor" else ()
        found, left = tests.of(mutant.site, first, 1 if known else OF_A_FILE)
        return found if known else found + left

    planned = [(mutant, planned_for(mutant)) for mutant in chosen]
    planned.sort(key=lambda plan: plan[1][0].split("::")[0])
    pytest.main([*ARGUMENTS, *POOL], plugins=[Trials(planned, tests, report)])
    minutes = (time.monotonic() - start) / 60
    print(f"{summary(trials)} in {minutes:.1f} minutes")
    if options.only:
        return 0
    faults = judge(trials, named)
    print(*faults, sep="\n")
    if options.write and not faults:
        write(trials, named, not_run(recorded), minutes)
    return int(bool(faults) or len(trials) != len(chosen))


def judge(trials: list[Trial], named: dict[str, str]) -> list[str]:
    """What must not be: survivors without a name, and names without a survivor."""
    survived = {str(trial.mutant) for trial in trials if trial.noticed_by is None}
    return [f"survived: {name}" for name in sorted(survived - named.keys())] + [
        f"named in {EQUIVALENT.name}, but not among the survivors: {name}"
        for name in sorted(named.keys() - survived)
    ]


def summary(trials: list[Trial]) -> str:
    """How many were noticed, and as what."""
    counts = Counter(trial.noticed_as or "survived" for trial in trials)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def write(trials: list[Trial], named: dict[str, str], unseen: list[str], minutes: float) -> None:
    """Record the table in `CARD`: by site, the test that notices."""
    sites = defaultdict(dict)
    for trial in trials:
        how = f"{trial.noticed_by}{' (error)' if trial.noticed_as == 'error' else ''}"
        sites[trial.mutant.site][trial.mutant.how] = how if trial.noticed_by else "equivalent"
    title = "each collective and scale factor of training, dropped and doubled: the test that notices"
    machine = f"{os.cpu_count()} cores, CPU, gloo"
    card = card_head("parity_mutants", title, "make parity-mutants", machine) | {
        "minutes": round(minutes, 1),
        "mutants": len(trials),
        "outcome": dict(Counter(trial.noticed_as or "equivalent" for trial in trials)),
        "equivalent": named,
        "not run by these tests, so not changed": unseen,
        "sites": sites,
    }
    CARD.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
