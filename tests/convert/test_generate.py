"""tools/generate.py: answers from the exported folder alone, streamed or from a file; one-line errors."""

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch

from megatron_eagle.errors import UserError
from megatron_eagle.inference.generate import ExportedModel, Request, Sampling, read_requests
from tests.convert.media import write_picture, write_video
from tests.paths import REPO

TOOL = str(REPO / "tools" / "generate.py")
# Runs the tool, then fails if Megatron or a training room was imported on the way.
WATCHED = """
import runpy, sys
try:
    runpy.run_path(sys.argv[1], run_name="__main__")
finally:
    rooms = ("megatron", "megatron_eagle.model", "megatron_eagle.training", "megatron_eagle.convert",
             "megatron_eagle.data", "megatron_eagle.runtime", "eagle_kernels")
    found = [m for m in sys.modules if any(m == room or m.startswith(room + ".") for room in rooms)]
    assert not found, found
"""


@pytest.fixture(scope="module")
def model(exported):
    return ExportedModel(exported)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return write_picture(tmp_path_factory.mktemp("media") / "p.png", 200, 100)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("media") / "v.mp4")


def run_tool(monkeypatch, capsys, *arguments):
    """Exit status, stdout and stderr of the tool, in this process."""
    monkeypatch.setattr("sys.argv", ["generate.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(TOOL, run_name="__main__")
    return exit.value.code or 0, *capsys.readouterr()


def test_the_tool_needs_the_folder_and_nothing_of_megatron(exported, picture, tmp_path):
    source = "import sys; sys.argv.pop(0)\n" + WATCHED.replace("sys.argv[1]", "sys.argv[0]")
    arguments = ["--hf", exported, "--image", picture, "--prompt", "What is it?", "--max-new-tokens", 4]
    # A folder called megatron would be found first.
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text("raise ImportError('not here')")
    result = subprocess.run(
        [sys.executable, "-c", source, TOOL, *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.strip() and not result.stderr.strip(), result.stderr.decode()


def test_streamed_text_is_the_answer(model, picture, capsys):
    request = Request("What is it?", (picture,))
    answer = model.answer(request, Sampling(max_new_tokens=6), stream=True)
    assert answer and capsys.readouterr().out.strip() == answer


def test_pictures_videos_and_their_sampling_reach_the_model(model, picture, video):
    clip = {"video": video, "start_time": 0.5, "end_time": 2.5}
    request = Request("Compare.", (picture, picture), (clip, video), max_tiles=1)
    inputs = model._inputs(request, Sampling(fps=3, max_frames=4))
    assert inputs["pixel_values"].shape[0] == 1 + 1 + 4 + 4
    text = model.processor.decode(inputs["input_ids"][0])
    assert "sampled with 2.00 fps: Frame 1 sample at 0.50s" in text  # four frames of two seconds
    more = model._inputs(Request("?", (picture,)), Sampling(max_tiles=6))
    assert more["pixel_values"].shape[0] > 1
    own = model._inputs(Request("?", (), ({"video": video, "nframes": 8},)), Sampling(fps=3, max_frames=4))
    assert own["pixel_values"].shape[0] == 8


def test_a_file_of_requests(exported, picture, tmp_path, monkeypatch, capsys):
    records = [
        {"id": 1, "prompt": "A?", "images": [picture], "max_tiles": 1},
        {"prompt": "B?", "images": None},
    ]
    questions, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ("--hf", exported, "--jsonl", questions, "--output", answers, "--max-new-tokens", 3)
    status, out, err = run_tool(monkeypatch, capsys, *options)
    assert status == 0 and "2 answers in" in out and "2/2" in err
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [{k: v for k, v in w.items() if k != "answer"} for w in written] == records
    assert all(isinstance(w["answer"], str) for w in written)


def test_decoding_is_greedy(model, exported, picture):
    request = Request("What is it?", (picture,))
    inputs = model._inputs(request, Sampling())
    ids = inputs["input_ids"]
    embeddings = model.model.merge_features(ids, inputs["pixel_values"])
    with torch.no_grad():
        first = model.model(inputs_embeds=embeddings).logits[0, -1].argmax()
    answer = model.answer(request, Sampling(max_new_tokens=1))
    assert answer == model.processor.decode([first], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "line 2 is empty"),
        ("{", "line 2 is not valid JSON"),
        ("[]", 'line 2: expected an object with a "prompt"'),
        ('{"prompt": "a", "images": "one.png"}', '"images" must be a list of paths'),
        ('{"prompt": "a", "max_tiles": 0}', '"max_tiles" must be a whole number of at least 1'),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "q.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(UserError, match=message):
        list(read_requests(file))


def test_bad_media_and_bad_settings_are_named(model, picture, video, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"PNG?")
    for request, message in [
        (Request("a", ("nowhere.png",)), "image not found: nowhere.png"),
        (Request("a", (str(broken),)), "broken.png"),
        (Request("a", (), ("nowhere.mp4",)), "video not found: nowhere.mp4"),
        (Request("a", (), (str(broken),)), "broken.png"),
        (Request("see <image-2>", (picture,)), "asks for <image-2>"),
        (Request("a", (), ({"video": video, "begin": 1},)), "unknown setting 'begin'"),
        (Request("a", (), ({"start": 1},)), 'needs its file under "video"'),
        (Request("a", (), ({"video": video, "end": "late"},)), "video_end must be a number"),
        (Request("a", (), ({"video": video, "start": 50},)), "no frame between"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            model.answer(request)
        assert "\n" not in str(error.value)


def test_a_folder_that_is_no_export_is_named(checkpoint, tmp_path, monkeypatch, capsys):
    for folder, message in [
        (tmp_path / "nowhere", "no such folder"),
        (checkpoint, "no exported Eagle 2.5 model"),
        ("nvidia/Eagle2.5-8B", "no such folder"),  # a name on a hub is not looked up
    ]:
        status, _, err = run_tool(monkeypatch, capsys, "--hf", folder, "--prompt", "a")
        assert status == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_contradicting_options_are_refused(exported, monkeypatch, capsys):
    status, _, err = run_tool(monkeypatch, capsys, "--hf", exported)
    assert status == 2 and "give either --prompt" in err
    status, _, err = run_tool(monkeypatch, capsys, "--hf", exported, "--prompt", "a", "--fps", "0")
    assert status == 2 and "not positive" in err
