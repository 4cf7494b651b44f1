"""The Eagle-Video example runs from clips to scores, and goes on where it was."""

import json
import socket
import subprocess
import sys

import pytest

from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.errors import UserError
from tests.convert.hf_folder import write_hf_folder
from tests.eagle_video.helpers import call_tool, example, make_clip
from tests.paths import MEDIA, REPO, need_media

RUN = REPO / "examples" / "eagle_video" / "run.py"


@pytest.fixture
def run(monkeypatch):
    """The example with its tools in this process; says what each of them said."""
    monkeypatch.syspath_prepend(RUN.parent)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    module = example("run")
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setattr(module, "PORT", free.getsockname()[1])

    def start(*arguments):
        said = []

        def run_tool(name, *more):
            said.append(call_tool(name, *more))
            return said[-1].returncode

        monkeypatch.setattr(module, "run_tool", run_tool)
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        module.main()
        return said

    return start


def test_clips_to_scores_and_again(run, tmp_path, capsys):
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    for number, scenes in enumerate([[1, 2], [1, 3], [4]]):
        make_clip(videos / f"{number}.mp4", scenes, seconds=8)
    (videos / "broken.mp4").write_bytes(b"no video")
    import_hf(write_hf_folder(tmp_path / "source"), tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "hf")
    arguments = ["--videos", videos, "--hf", tmp_path / "hf", "--output", out]
    run(*arguments)
    assert "worth nothing for training" in capsys.readouterr().out
    store = SampleStore(out / "data")
    samples = [json.loads(line) for name in ("clips", "story") for line in (out / f"{name}.jsonl").open()]
    assert len(store) == len(samples) > 4 and (out / "data" / "2048" / "packs.arrow").is_file()
    assert {sample["provenance"]["recipe"] for sample in samples} == {"clips", "story"}
    assert "broken" in (out / "story.dropped.jsonl").read_text()
    assert "<svg" in (out / "selection" / "report.html").read_text()
    scores = json.loads((out / "scores" / "scores.json").read_text())
    assert scores["asked"] == {"anls": 7}

    written = (out / "clips.jsonl").read_bytes()
    again = run(*arguments)
    assert (out / "clips.jsonl").read_bytes() == written
    assert sum("0 answers paid" in done.stdout for done in again) == 2


def test_mistakes_are_one_line(run, tmp_path):
    for arguments, problem in (
        (["--videos", tmp_path / "none"], "no such folder"),
        (["--videos", tmp_path], "0 videos"),
        (["--endpoint", "http://127.0.0.1/v1"], "belong together"),
    ):
        with pytest.raises(UserError, match=problem):
            run(*arguments, "--output", tmp_path / "out")


@pytest.mark.slow
@need_media
def test_real_clips_with_processes_of_their_own(tmp_path):
    command = [sys.executable, str(RUN), "--videos", str(MEDIA / "video"), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert len(SampleStore(tmp_path / "data")) > 30
    for name in ("kept", "refused"):
        assert (tmp_path / "selection" / f"{name}.jsonl").stat().st_size
    assert "undecodable frame" in (tmp_path / "story.dropped.jsonl").read_text()
