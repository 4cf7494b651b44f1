"""tools/generate.py: answers from the exported folder alone, streamed or from a file; one-line errors."""

import copy
import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_eagle.data.media.images import load_image
from megatron_eagle.data.media.source import file_metadata
from megatron_eagle.data.sampling.ads import SamplingSettings
from megatron_eagle.data.sampling.probe import PageMetadata
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.grids import select_grid
from megatron_eagle.hf_model.tiles import image_tiles, normalize
from megatron_eagle.inference.batch import answer_file, read_requests
from megatron_eagle.inference.generate import ExportedModel, Request, Sampling
from megatron_eagle.inference.prefill import prefill
from tests.convert.hf_folder import TILE
from tests.convert.media import write_picture, write_video
from tests.data.helpers import make_pdf
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
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPO}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.strip() and not result.stderr.strip(), result.stderr.decode()


def test_streamed_text_is_the_answer(model, picture):
    pieces = []
    request = Request("What is it?", (picture,))
    streams = {"on_text": pieces.append, "on_read": lambda: pieces.append("read ")}
    answer = model.answer(request, Sampling(max_new_tokens=6), **streams)
    assert answer and "".join(pieces).strip() == f"read {answer}" and len(pieces) > 2


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


def test_a_long_video_shows_as_many_frames_as_fit(exported, video, monkeypatch, capsys):
    """Said once. What is demanded is refused before it is decoded; long prompts show all where allowed."""
    monkeypatch.setattr(ExportedModel, "max_positions", 200)
    model, sampling = ExportedModel(exported), Sampling(fps=10, max_frames=5000, max_new_tokens=20)
    request = Request("What happens?", (), (video,))
    shown = model._inputs(request, sampling)
    assert 100 < shown["input_ids"].shape[1] <= 180 and 4 <= len(shown["pixel_values"]) < 30
    assert model.answer(request, sampling) == model.answer(request, sampling)
    said = capsys.readouterr().err
    assert said.count("note: fewer frames or tiles than asked for: as many as fit into 200 tokens") == 1
    demanded = Request("What happens?", (), ({"video": video, "nframes": 30},))
    monkeypatch.setattr(model.processor, "process_vision_info", None)
    with pytest.raises(UserError, match="the prompt has [0-9]+ tokens and the model was trained for 200"):
        model.answer(demanded, sampling)
    monkeypatch.undo()
    whole = ExportedModel(exported, allow_long_prompts=True)._inputs(request, sampling)
    assert len(whole["pixel_values"]) == 30


def test_pages_of_a_document_are_the_pictures_of_training(model, picture, tmp_path):
    """Pages are numbered after the pictures, drawn at the size of their grid, and not resized again."""
    path = str(make_pdf(tmp_path / "d.pdf", 2))
    inputs = model._inputs(Request("Read.", (picture,), documents=(path,), max_tiles=6), Sampling())
    text = model.processor.decode(inputs["input_ids"][0])
    places = [text.index(f"<image {k}>") for k in (1, 2, 3)]
    assert places == sorted(places) and "<image 4>" not in text
    demand = PageMetadata(file_metadata(path), 1, 595, 842, 10**8)
    settings = SamplingSettings(tile_size=TILE, max_tiles=6)
    shape = demand.demand(settings)
    grid = select_grid(shape.width, shape.height, tile_size=TILE, max_tiles=6)
    page = load_image(demand.name(grid, TILE), max_pixels=10**8)
    last = normalize(image_tiles(np.array(page), grid, TILE))
    assert len(last) > 2 and torch.equal(inputs["pixel_values"][-len(last) :], last)


def test_earlier_turns_are_part_of_the_prompt(model, picture):
    request = Request("Why?", (picture,), turns=(("What is it?", "A cat."),))
    text = model.processor.decode(model._inputs(request, Sampling())["input_ids"][0])
    places = [text.index(part) for part in ("<image 1>", "What is it?", "A cat.", "Why?")]
    assert places == sorted(places)


@pytest.mark.parametrize("chunk", [5, 7, 64])  # 4 tokens a tile: chunks end inside of tiles
def test_a_prompt_in_pieces_is_the_prompt_in_one(model, picture, video, chunk):
    request, sampling = Request("Compare.", (picture,), (video,)), Sampling(max_frames=8, max_new_tokens=8)
    inputs = model._inputs(request, sampling)
    embeddings = model.model.merge_features(inputs["input_ids"], inputs["pixel_values"])
    pixels = inputs["pixel_values"]
    cache, last = prefill(model.model, inputs["input_ids"], pixels, chunk)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] - 1
    with torch.no_grad():
        whole = model.model(inputs_embeds=embeddings).logits[0, -1]
        pieces = model.model(inputs_embeds=last[:, -1:], past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="more image tokens"):
        prefill(model.model, inputs["input_ids"], pixels[1:], chunk)
    with pytest.raises(ValueError, match="more visual features"):
        prefill(model.model, inputs["input_ids"], torch.cat([pixels, pixels[:1]]), chunk)
    chunked = copy.copy(model)
    chunked.prefill_chunk = chunk
    assert chunked.answer(request, sampling) == model.answer(request, sampling)


class _Killed(Exception):
    pass


def test_a_batch_goes_on_where_it_was_killed(tmp_path):
    questions, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text("".join(f'{{"prompt": "{name}"}}\n' for name in "abcd"))
    asked = []

    class Model:
        def answer(self, request, sampling, on_text=None):
            asked.append(request.prompt)
            if asked == ["a", "b", "c"]:
                raise _Killed
            return request.prompt.upper()

    def run(name="m", fps=None):
        return answer_file(Model(), questions, answers, Sampling(fps), name)

    with pytest.raises(_Killed):
        run()
    partial = tmp_path / "a.jsonl.partial"
    assert not answers.exists()
    partial.write_bytes(partial.read_bytes() + b'{"prompt": "c", "ans')  # the line that was being written
    for change, what in (({"name": "n"}, "model"), ({"fps": 1}, "sampling")):
        with pytest.raises(UserError, match=rf"\({what} differ\)"):
            run(**change)
    text = questions.read_text()
    questions.write_text(text.replace("d", "e"))
    with pytest.raises(UserError, match=r"requests differ") as error:
        run()
    assert "\n" not in str(error.value)
    questions.write_text(text)
    assert run() == 4 and asked == ["a", "b", "c", "c", "d"] and not partial.exists()
    assert [json.loads(line)["answer"] for line in answers.read_text().splitlines()] == ["A", "B", "C", "D"]
    assert run() == 4 and len(asked) == 9  # a complete run is no beginning
    partial.write_text("?\n")
    with pytest.raises(UserError, match="damaged"):
        run()


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


def test_what_else_ends_a_line_may_stand_in_a_prompt(tmp_path):
    file = tmp_path / "q.jsonl"
    said = "a\u2028b\u0085c\x1c\u2029"
    lines = [json.dumps({"prompt": said}, ensure_ascii=False), json.dumps({"prompt": "x"})]
    file.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    assert [request.prompt for _, _, request in read_requests(file)] == [said, "x"]
    file.write_text("")
    assert list(read_requests(file)) == []


def test_bad_media_and_bad_settings_are_named(model, picture, video, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"PNG?")
    for request, message in [
        (Request("a", ("nowhere.png",)), "image not found: nowhere.png"),
        (Request("a", (str(broken),)), "broken.png"),
        (Request("a", (), ("nowhere.mp4",)), "video not found: nowhere.mp4"),
        (Request("a", documents=("nowhere.pdf",)), "nowhere.pdf"),
        (Request("a", documents=(str(broken),)), "broken.png is no PDF file"),
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
