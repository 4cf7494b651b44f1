"""Both kits on vLLM with the plugin of an export."""

import json

import pytest

from megatron_eagle.inference.generate import Request, Sampling
from megatron_eagle.inference.server_client import ServedModel
from tests.kits.data import ENVIRONMENT, lmms_eval_tasks, run_bridge, vlmevalkit_data
from tests.serving.server import ENVIRONMENT as SERVING
from tests.serving.server import running, train_demo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((folder / ".complete").exists() for folder in (ENVIRONMENT, SERVING)),
        reason="no kits or no vLLM: make test-kits",
    ),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Of a server that may read the folder in which the tests' files are made."""
    root = tmp_path_factory.getbasetemp()
    demo = train_demo(tmp_path_factory.mktemp("demo"))
    with running(demo / "hf", demo / "server.log", "--allowed-local-media-path", str(root)) as address:
        yield address


def test_lmms_eval_has_the_answers_of_the_native_runner(url, tmp_path):
    data = lmms_eval_tasks(tmp_path / "tasks")
    lines = (data / "picture.json").read_text()
    long = {"picture": str(data / "p.png"), "video": None, "question": "word " * 3000, "answer": "A"}
    (data / "picture.json").write_text(lines + json.dumps(long) + "\n")
    names = ["tiny_pictures", "tiny_videos"]
    done = run_bridge("lmms-eval", tmp_path / "o", url, names, data, videos="files")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert "lmms-eval: tiny_videos: 0 of 2 requests failed" in done.stdout
    assert "lmms-eval: tiny_pictures: 1 of 3 requests failed; the first: [LMMS_EVAL" in done.stdout
    served, sampling = ServedModel(url), Sampling(max_frames=8, max_new_tokens=16)
    for kind, file in (("pictures", "p.png"), ("videos", "v.mp4")):
        (samples,) = (tmp_path / "o").rglob(f"*_samples_tiny_{kind}.jsonl")
        found = [json.loads(line) for line in samples.read_text().splitlines()][:2]
        media = {"images" if kind == "pictures" else "videos": (str(data / file),)}
        ours = [served.answer(Request(sample["input"], **media), sampling) for sample in found]
        assert [sample["filtered_resps"].strip() for sample in found] == [answer.strip() for answer in ours]


def test_vlmevalkit_is_answered(url, tmp_path):
    data = vlmevalkit_data(tmp_path / "LMUData")
    done = run_bridge("vlmevalkit", tmp_path / "o", url, ["tiny_pictures"], data)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "vlmevalkit: tiny_pictures: 0 of 2 requests failed" in done.stdout
