"""The files for Kubernetes and SkyPilot: known fields, one contract, options that our commands have."""

import copy
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.paths import REPO
from tests.project import shown_commands
from tests.schedulers.files import (
    KNOWN,
    KUBERNETES,
    SKYPILOT,
    documents,
    job_of,
    judged,
    kind,
    known,
    unknown,
    used,
)

NODE, LAUNCH = REPO / "examples" / "node.sh", REPO / "examples" / "launch.sh"
FILES = [*sorted(KUBERNETES.glob("*.yaml")), *sorted(SKYPILOT.glob("*.yaml"))]
JOBSET = documents(KUBERNETES / "jobset.yaml")[0]
RUNTIME, TRAINJOB = documents(KUBERNETES / "trainjob.yaml")
SKY = documents(SKYPILOT / "train.yaml")[0]
ALL = (JOBSET, RUNTIME, TRAINJOB, SKY)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_field_is_in_a_schema(file: Path) -> None:
    for document in documents(file):
        assert not unknown(document)
        assert document.get("apiVersion") == KNOWN[kind(document)].get("apiVersion")


def test_no_field_of_the_list_is_unused() -> None:
    """What two schemas share stands once: one of them may do without."""
    fields = {pattern.pattern.rpartition("spec\\.")[2] for name in KNOWN for pattern in known(name)}
    for document in ALL:
        paths = list(used(document))
        for pattern in known(kind(document)):
            if any(pattern.fullmatch(path) for path in paths):
                fields.discard(pattern.pattern.rpartition("spec\\.")[2])
    assert not fields


def test_a_misspelt_field_is_found() -> None:
    changed = copy.deepcopy(JOBSET)
    job_of(changed)["backofLimit"] = job_of(changed).pop("backoffLimit")
    assert unknown(changed) == ["spec.replicatedJobs[].template.spec.backofLimit"]
    assert unknown({**SKY, "resources": {**SKY["resources"], "use_spots": True}}) == ["resources.use_spots"]


@pytest.mark.parametrize("document", [JOBSET, RUNTIME], ids=kind)
def test_what_a_status_leads_to(document: dict) -> None:
    """A stop that has saved is started again and not counted, a mistake never, the rest is counted."""
    assert judged(document, 2) == "FailJobSet"
    assert judged(document, 75) == judged(document, 137, evicted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert {judged(document, status) for status in (1, 125, 137, 139)} == {"RestartJobSet"}
    job = job_of(document)
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"


def test_the_two_ways_on_kubernetes_are_one() -> None:
    """What both say is equal, but for what the TrainJob adds to the runtime."""
    (container,) = job_of(JOBSET)["template"]["spec"]["containers"]
    (other,) = job_of(RUNTIME)["template"]["spec"]["containers"]
    assert other.items() <= container.items()
    trainer, given = TRAINJOB["spec"]["trainer"], {entry["name"]: entry for entry in container["env"]}
    assert (trainer["command"], trainer["args"]) == (container["command"], container["args"])
    assert all(given[entry["name"]] == entry for entry in trainer["env"])
    assert trainer["resourcesPerNode"] == container["resources"]
    assert RUNTIME["spec"]["template"]["spec"]["failurePolicy"] == JOBSET["spec"]["failurePolicy"]
    jobs = [copy.deepcopy(job_of(document)) for document in (JOBSET, RUNTIME)]
    for job in jobs:
        del job["template"]["spec"]["containers"]
    assert jobs[1].items() <= jobs[0].items()


def test_numbers_of_nodes_agree() -> None:
    job = job_of(JOBSET)
    given = {entry["name"]: entry.get("value") for entry in job["template"]["spec"]["containers"][0]["env"]}
    assert given["PET_NNODES"] == str(job["parallelism"]) == str(job["completions"])
    assert TRAINJOB["spec"]["trainer"]["numNodes"] == RUNTIME["spec"]["mlPolicy"]["numNodes"]
    name, (replicated,) = JOBSET["metadata"]["name"], JOBSET["spec"]["replicatedJobs"]
    assert given["PET_MASTER_ADDR"] == f"{name}-{replicated['name']}-0-0.{name}"
    assert TRAINJOB["spec"]["runtimeRef"]["name"] == RUNTIME["metadata"]["name"]


@pytest.mark.parametrize("document", [JOBSET, RUNTIME, SKY], ids=kind)
def test_there_is_time_for_the_save(document: dict) -> None:
    if document is SKY:
        (hook,) = SKY["config"]["hooks"]
        grace, given = int(SKY["envs"]["GRACE_SECONDS"]), hook["timeout"]
    else:
        entries = TRAINJOB["spec"]["trainer"]["env"]
        grace = int(next(entry["value"] for entry in entries if entry["name"] == "GRACE_SECONDS"))
        given = job_of(document)["template"]["spec"]["terminationGracePeriodSeconds"]
    assert given - grace >= 30


def test_the_script_calls_what_there_is() -> None:
    text = NODE.read_text().replace("\\\n", " ")
    calls = re.findall(r'attend "\$\{place\[@\]\}" "\$python" (.*?)\|\|', text, re.DOTALL)
    calls += re.findall(r'"\$config" "\$python" +(tools/train.py preflight .*?) &\n', text)
    assert len(calls) == 3
    for call in calls:
        words = re.sub(r'"\$\{settings\[@\]\}" "\$@"', "", call)
        words = re.sub(r'"[^"]*\$[^"]*"', "1", words)
        command = words.replace("-m megatron_eagle.runtime.torchrun", "torchrun")
        command = command if "torchrun" in command else f"python {command}"
        assert not list(shown_commands.check(command))
        assert list(shown_commands.check(command.replace("--config", "--konfig")))
    assert re.findall(r"settings=\((\S+)\)", LAUNCH.read_text()) == ["resilience.abort_on_hang=true"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say(tmp_path: Path) -> None:
    scripts = {"run": SKY["run"], "hook": SKY["config"]["hooks"][0]["run"]}
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}")
    files = [str(NODE), str(LAUNCH), *(str(tmp_path / name) for name in scripts)]
    command = ["shellcheck", "-x", *files]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
