"""Two jobs on one run folder: the second is refused by name, and the first does not notice."""

import json
import re

import pytest

from tests.cluster.conftest import ONE_NODE, TRAIN

pytestmark = pytest.mark.slow


def test_the_second_of_two_jobs_is_refused(slurm, config, tmp_path):
    metrics = tmp_path / "run" / "logs" / "metrics.jsonl"
    first = slurm.submit(TRAIN, str(config), options=ONE_NODE)
    slurm.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, first)
    second = slurm.submit(TRAIN, str(config), options=ONE_NODE, environment={"MAX_RESTARTS": "0"})
    slurm.wait(second, "FAILED")
    refused = (
        rf"^\[rank 0\] error: {tmp_path / 'run'}: another run writes here \(job {first}, process \d+ on n\d, "
    )
    assert len(re.findall(refused, slurm.output(second), re.M)) == 1, slurm.output(second)
    owner = json.loads((tmp_path / "run" / "owner.json").read_text())
    assert owner["job"] == f"tests/{first}"
    iterations = len(metrics.read_text().splitlines())
    slurm.wait_until(lambda: len(metrics.read_text().splitlines()) > iterations, first)
    numbers = [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))
