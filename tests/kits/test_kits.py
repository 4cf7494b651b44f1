"""lmms-eval and VLMEvalKit as `evaluate bridge` runs them, on an endpoint; `make test-kits` has the kits."""

import json
import os
import re
import shutil
import subprocess

import pytest

from megatron_eagle.evaluation.kit_names import NAMES, video_setting
from tests.eagle_video.server import serving
from tests.kits.data import (
    ENVIRONMENT,
    FRAMES,
    hub_with_videos,
    lmms_eval_tasks,
    run_bridge,
    vlmevalkit_data,
)
from tests.paths import REPO

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ENVIRONMENT / ".complete").exists(), reason="no kits: make test-kits"),
]
REFUSED = [("status", 400, {})] * 99


def kinds(request):
    """Of the parts of its last turn, and its text."""
    parts = request["messages"][-1]["content"]
    text = " ".join(part["text"] for part in parts if part["type"] == "text")
    return [part["type"] for part in parts], text


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return lmms_eval_tasks(tmp_path_factory.mktemp("lmms") / "tasks")


@pytest.fixture(scope="module")
def lmu(tmp_path_factory):
    return vlmevalkit_data(tmp_path_factory.mktemp("vlm") / "LMUData")


def test_the_names_are_the_kits_own(tmp_path):
    classes = {
        "ERQA": "ERQADataset",
        "POPE": "ImageYORNDataset",
        "HallusionBench": "ImageYORNDataset",
        "MMMU_Pro_10c": "MMMUProDataset",
        "MMMU_DEV_VAL": "MMMUDataset",
        "OCRBench": "OCRBench",
        "OCRBench_v2": "OCRBench_v2",
        "MathVision": "MathVision",
        "MathVista_MINI": "MathVista",
        "MathVerse_MINI": "MathVerse",
        "HRBench4K": "HRBenchDataset",
        "MMVet": "MMVet",
        "DocVQA_VAL": "ImageVQADataset",
    }
    ours = {name.vlmevalkit for name in NAMES.values()} - {None}
    settings = {name: video_setting(name, 256) for name in ours}
    videos = {name: setting for name, setting in settings.items() if setting is not None}
    asked = {"lmms_eval": [n.lmms_eval for n in NAMES.values() if n.lmms_eval], "videos": videos}
    asked["vlmevalkit"] = sorted({*(ours - set(videos)), *classes, "no such set"})
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    words = [str(ENVIRONMENT / "bin" / "python"), "-W", "ignore", str(REPO / "tests" / "kits" / "names.py")]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([*words, "asked.json"], cwd=tmp_path, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["unknown"] == []
    assert found["model"] == "lmms_eval.models.chat.openai.OpenAICompatible, simple: False"
    assert set(asked["vlmevalkit"]) - set(found["built"]) == {"no such set"}
    assert {name: found["built"][name] for name in classes} == classes
    assert len(videos) == 8 and not any(found["refused"].values()), found["refused"]
    assert {"Video-MME_1fps", "MVBench_8frame", "LongVideoBench_8frame_subs"} <= set(found["presets"])


def test_lmms_eval_asks_with_the_frames_that_it_is_told(tasks, tmp_path):
    with serving(lambda request: "A") as server:
        done = run_bridge("lmms-eval", tmp_path, server.url, ["tiny_pictures", "tiny_videos"], tasks)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "lmms-eval: tiny_videos: 0 of 2 requests failed" in done.stdout
    shown = sorted((len(parts) - 1, parts[-1], text) for parts, text in map(kinds, server.requests))
    assert shown == [
        (1, "text", "picture A?"),
        (1, "text", "picture B?"),
        (8, "text", "video A?"),
        (8, "text", "video B?"),
    ]
    assert {(request["model"], request["max_tokens"]) for request in server.requests} == {("eagle2.5", 16)}
    (scores,) = (tmp_path / "results").rglob("*_results.json")
    right = json.loads(scores.read_text())["results"]
    assert {name: value["right,none"] for name, value in right.items()} == {
        "tiny_pictures": 0.5,
        "tiny_videos": 0.5,
    }


def test_lmms_eval_leaves_videos_to_the_server_and_its_failures_are_counted(tasks, tmp_path):
    with serving(lambda request: "A") as server:
        server.faults = REFUSED
        names = ["tiny_videos"]
        done = run_bridge("lmms-eval", tmp_path, server.url, names, tasks, videos="files")
    assert done.returncode == 1
    assert "lmms-eval: tiny_videos: 2 of 2 requests failed; the first: [LMMS_EVAL_REQUEST" in done.stdout
    request = server.requests[0]
    assert request["messages"][0]["content"][0]["video_url"] == {"url": f"file://{tasks}/v.mp4"}
    assert request["media_io_kwargs"] == {"video": {"num_frames": 8}}


def test_lmms_eval_ends_at_a_video_with_fewer_frames_and_says_success(tasks, tmp_path):
    with serving(lambda request: "A") as server:
        names = ["tiny_videos"]
        done = run_bridge("lmms-eval", tmp_path, server.url, names, tasks, max_frames=FRAMES + 2)
    assert done.returncode == 1 and "lmms-eval: no answers, see above why it ended" in done.stdout
    assert server.requests == [] and f"nframes should in interval [2, {FRAMES}]" in done.stderr + done.stdout


def test_vlmevalkit_asks_pictures_and_videos(lmu, tmp_path):
    names = ["tiny_pictures", "erqa", "VideoMMMU_5frame"]
    with serving(lambda request: "A") as server:
        hub = hub_with_videos(tmp_path / "hub")
        options = ("--mode", "infer")
        done = run_bridge("vlmevalkit", tmp_path / "o", server.url, names, lmu, *options, HF_HOME=str(hub))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name, count in (("tiny_pictures", 2), ("ERQA", 2), ("VideoMMMU_5frame", 1)):
        assert f"vlmevalkit: {name}: 0 of {count} requests failed" in done.stdout
    shown = [kinds(request)[0].count("image_url") for request in server.requests]
    assert sorted(shown) == [1, 1, 1, 1, 5]
    assert {request["max_tokens"] for request in server.requests} == {1024}


def test_vlmevalkit_scores_by_matching_and_counts_failures(lmu, tmp_path):
    with serving(lambda request: "The answer is A") as server:
        right = run_bridge("vlmevalkit", tmp_path, server.url, ["tiny_pictures"], lmu)
    assert right.returncode == 0 and re.search(r"Overall +0\.5", right.stdout + right.stderr)
    with serving(lambda request: "A") as server:
        server.faults = REFUSED
        words = ("--retry", "1")
        failed = run_bridge("vlmevalkit", tmp_path, server.url, ["tiny_pictures"], lmu, *words)
    assert failed.returncode == 1 and len(server.requests) == 2  # the answers above are not taken again
    assert "vlmevalkit: tiny_pictures: 2 of 2 requests failed; the first: Failed to obtain" in failed.stdout


def test_vlmevalkit_leaves_videos_to_the_server(lmu, tmp_path):
    with serving(lambda request: "A") as server:
        hub = hub_with_videos(tmp_path / "hub")
        options = ("--mode", "infer")
        settings = {"videos": "files", "HF_HOME": str(hub)}
        done = run_bridge("vlmevalkit", tmp_path / "o", server.url, ["VideoMMMU"], lmu, *options, **settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (request,) = server.requests
    assert kinds(request)[0] == ["video_url", "text"]
    assert request["media_io_kwargs"] == {"video": {"max_frames": 8}}


def test_a_certificate_names_what_the_kits_make_of_pictures(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "hf")
    words = [str(ENVIRONMENT / "bin" / "python"), "-W", "ignore", "-m", "megatron_eagle"]
    paths = {"PYTHONPATH": f"{REPO}:{REPO / 'kernels'}"}
    words += ["convert", "certify", "--hf", str(folder)]
    done = subprocess.run(words, env={**os.environ, **paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "GREEN" in done.stdout, done.stdout + done.stderr[-2000:]
    assert "kits: vlmeval, lmms_eval" in done.stdout
    # VLMEvalKit writes JPEG, and makes small pictures larger; lmms-eval writes the pixels as they are.
    assert "made: page: the messages of vlmeval differ at pixels (picture 1" in done.stdout
    assert "the messages of lmms_eval differ" not in done.stdout
