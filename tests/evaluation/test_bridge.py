"""The script that runs another kit, and its count of failed requests; `make test-kits` runs the kits."""

import json
import subprocess
import sys

import pytest

from megatron_eagle.commands import evaluate
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation import kit_answers
from megatron_eagle.evaluation.bridge import Bridge, write_bridge
from megatron_eagle.evaluation.kit_names import NAMES, VIDEO_CLASSES
from megatron_eagle.evaluation.published.registry import BENCHMARKS

URL = "http://127.0.0.1:8000"


def bridge(*tasks, model="eagle", **settings):
    return Bridge(URL, model, list(tasks), **settings)


def test_lmms_eval_gets_its_model_for_chats_and_the_frames(tmp_path):
    script = write_bridge("lmms-eval", bridge("video-mme", "mvbench", "mme"), tmp_path)
    assert f"OPENAI_API_BASE={URL}/v1" in script and "--tasks videomme,mvbench,mme" in script
    assert "--model openai_compatible --model_args model_version=eagle,max_frames_num=256 " in script
    assert "HF_HUB_OFFLINE" not in script and "sk-" not in script
    subprocess.run(["bash", "-n", tmp_path / "evaluate.sh"], check=True)
    files = write_bridge("lmms-eval", bridge("x", max_frames=512, videos="files", data=tmp_path), tmp_path)
    assert "max_frames_num=512,pass_video_url=True " in files and f"--include_path {tmp_path}" in files
    assert "export HF_HUB_OFFLINE=1" in files


def test_vlmevalkit_gets_videos_as_dictionaries_and_pictures_by_name(tmp_path):
    tasks = ["MMStar", "erqa", "MMMU_Pro_10c", "Video-MME_64frame", "mvbench", "MMBench-Video"]
    asked = bridge(*tasks, "LongVideoBench_8frame_subs", "Video-MME_1fps", max_frames=512)
    script = write_bridge("vlmevalkit", asked, tmp_path)
    assert f"--data MMStar ERQA MMMU_Pro_10c --model eagle --base-url {URL}/v1 --max-tokens 1024" in script
    subprocess.run(["bash", "-n", tmp_path / "evaluate.sh"], check=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"]["eagle"]["api_base"] == f"{URL}/v1/chat/completions"
    assert config["data"] == {
        "Video-MME_64frame": {"class": "VideoMME", "dataset": "Video-MME", "nframe": 64},
        "MVBench": {"class": "MVBench", "dataset": "MVBench", "nframe": 512},
        "MMBench-Video": {"class": "MMBenchVideo", "pack": False, "dataset": "MMBench-Video", "nframe": 512},
        "LongVideoBench_8frame_subs": {
            "class": "LongVideoBench",
            "dataset": "LongVideoBench",
            "nframe": 8,
            "use_subtitle": True,
        },
        "Video-MME_1fps": {},  # the kit knows it by this name
    }
    write_bridge("vlmevalkit", bridge("Video-MME", max_frames=8, videos="files"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"]["eagle"]["media_io_kwargs"] == {"video": {"max_frames": 8}}


@pytest.mark.parametrize(
    ("kit", "asked", "said"),
    [
        ("lmms-eval", Bridge("somewhere", "m", ["x"]), "expected the URL"),
        ("lmms-eval", bridge("x", model="a,b"), "a,b: lmms-eval takes no name with a comma"),
        ("lmms-eval", bridge("hourvideo"), "hourvideo: not in lmms-eval; of the published benchmarks it has"),
        (
            "vlmevalkit",
            bridge("MVBench_long"),
            "MVBench_long: unknown to VLMEvalKit; of videos it has Video-MME",
        ),
        ("vlmevalkit", bridge("MLVU_8frame_subs"), "no subtitles for MLVU"),
        ("vlmevalkit", bridge("MMStar", model="m/eagle"), "serve it under a name without a slash"),
        ("vlmevalkit", bridge("MLVU_8frame", videos="files"), "every video has --max-frames"),
    ],
)
def test_what_a_kit_cannot_do_is_said(kit, asked, said, tmp_path):
    with pytest.raises(UserError, match=said):
        write_bridge(kit, asked, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_the_command_refuses_a_folder_that_is_not_there(tmp_path):
    words = ["bridge", "--kit", "lmms-eval", "--endpoint", URL, "--model", "m", "--tasks", "x"]
    with pytest.raises(UserError, match="gone: not a folder of data for lmms-eval"):
        evaluate.main([*words, "--output", str(tmp_path), "--data", str(tmp_path / "gone")])


def test_every_published_benchmark_is_in_the_table_of_names():
    assert list(NAMES) == list(BENCHMARKS)
    names = {name.vlmevalkit for name in NAMES.values()} - {None}
    videos = {name for name in names if name.startswith(("Video", "MVB", "MLVU", "Long", "CG", "MMBench-"))}
    assert len(videos) == 8 and {name.removesuffix("_subs") for name in videos} <= set(VIDEO_CLASSES)


def sample(answer, tokens=3):
    return json.dumps({"filtered_resps": answer, "token_counts": [{"output_tokens": tokens}]})


def test_failed_requests_are_counted_with_the_first_reason(tmp_path, capsys):
    failed = "[LMMS_EVAL_REQUEST_FAILED after 5 retries] Error code: 400"
    results = tmp_path / "eagle"
    results.mkdir()
    (results / "1_samples_old.jsonl").write_text(f"{sample('A')}\n")
    (results / "1_samples_new.jsonl").write_text(f"{sample(failed)}\n")
    (results / "2_samples_new.jsonl").write_text(
        "\n".join([sample("None"), sample(["B"]), sample(failed), sample("None", 0)]) + "\n"
    )
    assert kit_answers.main("lmms-eval", str(tmp_path)) == 1
    said = capsys.readouterr().out
    assert "lmms-eval: old: 0 of 1 requests failed\n" in said
    assert f"lmms-eval: new: 1 of 4 requests failed, 1 answers are empty; the first: {failed}\n" in said
    (results / "3_samples_new.jsonl").write_text(f"{sample('B')}\n")
    assert kit_answers.main("lmms-eval", str(tmp_path)) == 0


def test_a_task_without_answers_is_no_success(tmp_path):
    for words, said in (
        (["lmms-eval", tmp_path], "lmms-eval: no answers, see above why it ended"),
        (["vlmevalkit", tmp_path / "none", "ERQA"], "vlmevalkit: ERQA: no answers, see above why"),
    ):  # by itself, as a kit's environment runs it, or one in which the kit is not
        alone = [sys.executable, "-S", kit_answers.__file__, *words]
        done = subprocess.run(alone, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and said in done.stdout and not done.stderr
    text, whole = kit_answers.report_failures("vlmevalkit", {"MMStar": ["A"]}, ["MMStar", "ERQA"])
    assert not whole and "ERQA: no answers" in text
    assert kit_answers.report_failures("vlmevalkit", {"MMStar": ["A"]}, ["MMStar"])[1]
