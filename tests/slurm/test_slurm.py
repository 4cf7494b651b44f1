"""The Slurm examples against a stand-in: clean shell, legal flags, a chain of stages, a stopped run."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_eagle.checkpoint import read_train_state
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.training.monitoring.metrics import read_metrics
from megatron_eagle.training.resilience.faults import VARIABLE
from tests.convert.hf_folder import write_hf_folder
from tests.data.helpers import conversation, make_store, make_tokenizer
from tests.paths import REPO

SLURM = REPO / "examples" / "slurm"
LENGTH = 256


@pytest.fixture
def slurm(tmp_path):
    """Environment with the stand-in's commands on PATH."""
    commands = tmp_path / "bin"
    commands.mkdir()
    standins = {"older_python": "older_python.py"}
    for name in ("sbatch", "srun", "scontrol", *standins):
        file = commands / name
        standin = standins.get(name, "standin.py")
        file.write_text(f"#!{sys.executable}\n{(REPO / 'tests' / 'slurm' / standin).read_text()}")
        file.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "STANDIN_DIR": str(tmp_path),
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}",
        "REPO": str(REPO),
        "RANK_LOGS": str(tmp_path / "ranks"),
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PREFLIGHT": "no",
    }


def write_config(folder: Path, *, save: Path) -> Path:
    """A run of 2000 iterations on a store of 40 samples, both below `folder`."""
    records = [conversation("Hi", "Yes " * (k % 5 + 1)) for k in range(40)]
    store = make_store(folder, make_tokenizer(folder / "tokenizer"), records, (LENGTH,))
    write_packs(store, LENGTH, seed=0)
    sections = {
        "model": {"preset": "tiny", "vision": {"image_size": 28, "patch_size": 14}},
        "data": {"path": str(store), "length": LENGTH},
        "training": {"train_iterations": 2000, "global_batch_size": 2, "precision": "fp32"},
        "checkpoint": {"path": str(save)},
        "logging": {"progress": False, "tensorboard": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(sections))
    return folder / "run.yaml"


def jobs(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "jobs.jsonl").read_text().splitlines()]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    scripts = [str(file) for file in SLURM.iterdir() if file.suffix in (".sh", ".sbatch")]
    assert len(scripts) == 9
    result = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", ["train", "preprocess", "convert"])
def test_options_are_slurms(slurm, tmp_path, script):
    command = ["sbatch", str(SLURM / f"{script}.sbatch"), "argument"]
    subprocess.run(command, env={**slurm, "STANDIN_SUBMIT_ONLY": "1"}, check=True)
    assert jobs(tmp_path)[0]["arguments"] == ["argument"]
    refused = subprocess.run(["sbatch", "--nods=2", *command[1:]], env=slurm, capture_output=True, text=True)
    assert refused.returncode == 1 and "unrecognized option '--nods'" in refused.stderr


def test_stages_become_a_chain(slurm, tmp_path):
    config = REPO / "examples" / "eagle2.5-8b" / "progressive.yaml"
    command = [str(SLURM / "progressive.sh"), str(config), "--nodes=4"]
    environment = {**slurm, "STANDIN_SUBMIT_ONLY": "1", "MAIL_USER": "me@here"}
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert result.stdout.splitlines()[1] == "stage1_5: job 101"
    submitted = jobs(tmp_path)
    names = list(yaml.safe_load(config.read_text())["stages"])
    assert [job["arguments"][1:] for job in submitted] == [["--stage", name] for name in names]
    assert [job["options"].get("dependency") for job in submitted] == [
        None,
        "afterok:100",
        "afterok:101",
        "afterok:102",
        "afterok:103",
    ]
    assert {job["options"]["nodes"] for job in submitted} == {"4"}
    run = Path(yaml.safe_load(config.read_text())["checkpoint"]["path"]).name
    assert [job["options"]["job-name"] for job in submitted] == [f"eagle-{run}-{name}" for name in names]
    mail = {(job["options"]["mail-user"], job["options"]["mail-type"]) for job in submitted}
    assert mail == {("me@here", "FAIL,END")}


def test_a_chain_asks_for_names_without_torch() -> None:
    """Which takes seconds on a login node, and much longer where its file system is busy."""
    script = "import sys; import megatron_eagle.training.stage_settings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=REPO, check=True)
    assert "training.stage_settings import" in (SLURM / "progressive.sh").read_text()


def test_a_chain_of_no_file(slurm, tmp_path):
    command = [str(SLURM / "progressive.sh"), str(tmp_path / "absent.yaml")]
    refused = subprocess.run(command, env=slurm, capture_output=True, text=True)
    said = f"error: {tmp_path}/absent.yaml: cannot read this configuration file: No such file or directory\n"
    assert (refused.returncode, refused.stderr) == (2, said) and not (tmp_path / "jobs.jsonl").exists()


@pytest.mark.parametrize(
    "options",
    [
        "--output=FOLDER/%j.out",
        "--error=FOLDER/%j.out",
        "--output FOLDER/x",
        "-o FOLDER/x",
        "-e FOLDER/x",
        "-oFOLDER/x",
    ],
)
def test_a_missing_folder_for_the_output(slurm, tmp_path, options):
    """Before anything is submitted: Slurm would end the jobs without a word."""
    config, folder = REPO / "examples" / "eagle2.5-8b" / "progressive.yaml", tmp_path / "absent"
    given = [word.replace("FOLDER", str(folder)) for word in options.split()]
    command = [str(SLURM / "progressive.sh"), str(config), *given]
    refused = subprocess.run(command, env=slurm, capture_output=True, text=True)
    said = f"{given[0]}: no folder {folder} for the job's output: make it first\n"
    assert (refused.returncode, refused.stderr) == (2, said) and not (tmp_path / "jobs.jsonl").exists()


def test_a_chain_of_a_path_in_the_repository(slurm, tmp_path):
    """Called elsewhere: where the jobs will read it."""
    (tmp_path / "examples").mkdir()
    command = [str(SLURM / "progressive.sh"), "examples/eagle2.5-8b/progressive.yaml"]
    subprocess.run(command, env={**slurm, "STANDIN_SUBMIT_ONLY": "1"}, cwd=tmp_path, check=True)
    assert len(jobs(tmp_path)) == 5


@pytest.mark.slow
def test_preprocessing_over_two_nodes(slurm, tmp_path):
    """A head and a worker of Ray, the same bytes as on one machine, and nothing left running."""
    module = tmp_path / "modules" / "ray"
    (module / "scripts").mkdir(parents=True)
    shutil.copy(REPO / "tests" / "slurm" / "ray_standin.py", module / "__init__.py")
    (module / "scripts" / "scripts.py").write_text("import ray\n\nray.main()\n")
    make_tokenizer(tmp_path / "tokenizer")
    records = [conversation("Hi", "Yes " * (k % 5 + 1)) for k in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "recipe.json").write_text(json.dumps({"chat": {"annotation": str(tmp_path / "data.jsonl")}}))
    arguments = ["--recipe", str(tmp_path / "recipe.json"), "--tokenizer", str(tmp_path / "tokenizer")]
    arguments += ["--max-tokens", str(LENGTH), "--tile-size", "28", "--patch-size", "14"]
    environment = {
        **slurm,
        "PYTHONPATH": f"{tmp_path / 'modules'}:{slurm['PYTHONPATH']}",
    }
    submit = ["sbatch", "--nodes=2", str(SLURM / "preprocess.sbatch"), *arguments]
    job = subprocess.run(
        [*submit, "--output", str(tmp_path / "ray")], env=environment, capture_output=True, text=True
    )
    assert job.returncode == 0, job.stdout + job.stderr
    deadline = time.monotonic() + 20
    while list((tmp_path / "ray_nodes").glob("*")):
        assert time.monotonic() < deadline, "nodes of Ray outlive the job"
        time.sleep(0.1)
    local = [slurm["PYTHON"], "tools/preprocess_data.py", "run", *arguments, "--workers", "1"]
    command = [*local, "--output", str(tmp_path / "local")]
    subprocess.run(command, cwd=REPO, env=slurm, check=True, capture_output=True)
    for name in ("tokens.bin", "samples.arrow"):
        found, expected = (tmp_path / way / str(LENGTH) / name for way in ("ray", "local"))
        assert found.read_bytes() == expected.read_bytes()

    failed = subprocess.run(
        [*submit, "--output", str(tmp_path / "other"), "--fps", "-1"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert failed.returncode == 2 and "error: " in failed.stderr


@pytest.mark.slow
def test_conversion_both_ways(slurm, tmp_path):
    source = write_hf_folder(tmp_path / "hf")
    submit = ["sbatch", str(SLURM / "convert.sbatch")]
    checkpoint, exported = str(tmp_path / "checkpoint"), str(tmp_path / "exported")
    for arguments in (
        ["import", "--hf", str(source), "--checkpoint", checkpoint],
        ["export", "--checkpoint", checkpoint, "--hf", exported],
    ):
        job = subprocess.run([*submit, *arguments], env=slurm, capture_output=True, text=True)
        assert job.returncode == 0, job.stdout + job.stderr
    weights = "model.safetensors"
    assert (tmp_path / "exported" / weights).read_bytes() == (source / weights).read_bytes()
    failed = subprocess.run(
        [*submit, "import", "--hf", "absent", "--checkpoint", "c"], env=slurm, capture_output=True, text=True
    )
    assert failed.returncode == 2 and failed.stderr.startswith("error: absent")


TRAINER = """
import os, signal, sys, time
from pathlib import Path
log = Path(sys.argv[sys.argv.index("--config") + 1])
def note(text):
    with open(log, "a") as file:
        file.write(f"{text}\\n")
note(f"start, SIGUSR1 {signal.getsignal(signal.SIGUSR1).name}")
time.sleep(0.5)  # a signal that comes now is not lost
told = []
before = signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
while not told:
    time.sleep(0.05)
signal.signal(signal.SIGUSR1, before)
time.sleep(1.3)  # a save, during which the signal comes again
note("saved")
Path(sys.argv[sys.argv.index("--outcome") + 1]).write_text("started 0\\nstopped 1\\n")
"""


def test_a_torchrun_of_before_the_flags(slurm, tmp_path):
    """It is asked, lives on, and starts nothing again; the signal reaches the training processes even if it
    comes before they take it."""
    log, trainer = tmp_path / "log", tmp_path / "trainer.py"
    log.touch()
    trainer.write_text(TRAINER)
    environment = {**slurm, "PROCESSES": "1", "PYTHON": "older_python", "STANDIN_TRAINER": str(trainer)}
    submit = ["sbatch", "--nodes=2", str(SLURM / "train.sbatch"), str(log)]
    job = subprocess.Popen(
        submit, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 60
    while len(log.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    (tmp_path / "deliver").touch()
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and "job 100 goes back to the queue" in output, output
    assert log.read_text().splitlines() == ["start, SIGUSR1 SIG_IGN"] * 2 + ["saved"] * 2
    refused = subprocess.run(
        ["older_python", "-m", "torch.distributed.run", "--shutdown-timeout", "9", "tools/train.py"],
        env=slurm,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2 and "unrecognized arguments: --shutdown-timeout" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("python", [sys.executable, "older_python"], ids=["today", "older torchrun"])
def test_a_job_is_stopped_requeued_and_goes_on(slurm, tmp_path, python):
    """Two nodes with one CPU process each, through torchrun; the signal reaches the batch script alone."""
    run = tmp_path / "run"
    config = write_config(tmp_path, save=run)
    environment = {**slurm, "PROCESSES": "1", "MAX_RESTARTS": "1", "PYTHON": python}
    # A process dies once: torchrun starts all again.
    fault = {"kind": "kill", "rank": 1, "iteration": 2, "once": str(tmp_path / "killed")}
    environment[VARIABLE] = json.dumps([fault])
    submit = ["sbatch", "--nodes=2", str(SLURM / "train.sbatch"), str(config)]

    job = subprocess.Popen(
        submit, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 300
    while len(read_metrics(run / "logs" / "metrics.jsonl")) < 2:
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0]
        time.sleep(0.2)
    (tmp_path / "deliver").touch()
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert "which is saved; start again to go on (status 0)" in output
    assert (tmp_path / "killed").exists()
    assert output.count("resumed from") == 0, "torchrun starts nothing again that was stopped"
    assert (tmp_path / "requeued").read_text() == "100"
    stopped = read_train_state(run).iteration
    assert stopped >= 2

    submit.append(f"training.stop_at_iteration={stopped + 1}")
    again = subprocess.run(submit, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"at iteration {stopped}" in again.stderr
    assert [m.iteration for m in read_metrics(run / "logs" / "metrics.jsonl")][-1] == stopped + 1


def refused(environment: dict[str, str], *submit: str) -> str:
    """What a job prints that no training process comes of."""
    job = subprocess.run(["sbatch", *submit], env=environment, capture_output=True, text=True)
    assert job.returncode != 0 and "iteration" not in job.stderr
    return job.stdout + job.stderr


def test_settings_are_looked_at_first(slurm, tmp_path):
    submit = ["--nodes=2", str(SLURM / "train.sbatch")]
    config = write_config(tmp_path, save=tmp_path / "run")
    said = refused({**slurm, "PROCESSES": "3"}, *submit, str(config))
    assert "global_batch_size is 2: must be a multiple of the data parallel size 6" in said


@pytest.mark.slow
def test_the_preflight_counts_gpus(slurm, tmp_path):
    config = write_config(tmp_path, save=tmp_path / "run")
    gpus = tmp_path / "bin" / "nvidia-smi"
    gpus.write_text("#!/bin/sh\necho '0, GPU-1, a stand-in, 1.0, Enabled, Enabled, 0, 0x0'\n")
    gpus.chmod(0o755)
    environment = {"SLURM_GPUS_ON_NODE": "2", "PREFLIGHT": "yes", "MASTER_ADDR": "localhost"}
    said = refused({**slurm, **environment}, "--nodes=1", str(SLURM / "train.sbatch"), str(config))
    assert "bad node: n1: 1 GPUs, and 2 processes want one each" in said
