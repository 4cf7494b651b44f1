"""The files of examples/kubernetes and examples/skypilot: their fields, and what becomes of a status."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.paths import REPO

KUBERNETES, SKYPILOT = REPO / "examples" / "kubernetes", REPO / "examples" / "skypilot"
KNOWN: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("fields.yaml").read_text())


def documents(file: Path) -> list[dict[str, Any]]:
    """What the file holds."""
    return list(yaml.safe_load_all(file.read_text()))


def kind(document: dict[str, Any]) -> str:
    """By whose schema a document is read."""
    return document.get("kind", "SkyPilot")


def used(value: object, path: str = "") -> Iterator[str]:
    """The path of each value, `[]` for a list's element; lists of plain values and empty ones are values."""
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from used(below, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for below in value:
            yield from used(below, f"{path}[]")
    else:
        yield path


def known(name: str) -> list[re.Pattern[str]]:
    """The fields of our list, as patterns of whole paths."""
    paths = (
        f"{prefix}.{field}" if prefix else field
        for prefix, fields in KNOWN[name]["fields"].items()
        for field in fields
    )
    return [re.compile(re.escape(path).replace(r"\.\*", r"\..+")) for path in paths]


def unknown(document: dict[str, Any]) -> list[str]:
    """The fields of a document that our list does not have."""
    patterns = known(kind(document))
    return [path for path in used(document) if not any(pattern.fullmatch(path) for pattern in patterns)]


def job_of(document: dict[str, Any]) -> dict[str, Any]:
    """The specification of the job in a JobSet or TrainingRuntime."""
    spec = document["spec"] if kind(document) == "JobSet" else document["spec"]["template"]["spec"]
    (job,) = spec["replicatedJobs"]
    return job["template"]["spec"]


def judged(document: dict[str, Any], status: int, *, evicted: bool = False) -> str:
    """The JobSet's action when a pod ends with this status: read from Kubernetes' and JobSet's documentation.

    A Job with `backoffLimit: 0` fails with its first failed pod; reason and message say by which rule.
    """
    reason, message = "BackoffLimitExceeded", ""
    for number, rule in enumerate(job_of(document)["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        if status in rule.get("onExitCodes", {}).get("values", []):
            message = f"Container node for pod default/eagle-node-0-0-x7k2p failed with exit code {status} "
            reason, message = "PodFailurePolicy", f"{message}matching FailJob rule at index {number}"
            break
        if evicted and "onPodConditions" in rule:
            reason, message = (
                "PodFailurePolicy",
                "Pod default/eagle-node-0-0-x7k2p has condition DisruptionTarget",
            )
            break
    policy = (document["spec"] if kind(document) == "JobSet" else document["spec"]["template"]["spec"])[
        "failurePolicy"
    ]
    for rule in policy["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"
