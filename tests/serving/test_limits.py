"""Long videos and large pictures at vLLM: as much as a prompt holds, by the export's own rule."""

import json
import re
import secrets
import urllib.request

import pytest

from megatron_eagle.commands import evaluate
from megatron_eagle.inference.generate import ExportedModel, Request, Sampling
from megatron_eagle.inference.server_client import ServedModel
from tests.convert.media import write_picture, write_video
from tests.serving.server import ENVIRONMENT, ask, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ENVIRONMENT / ".complete").exists(), reason="no vLLM: make test-serving"),
]
SHORT = Sampling(max_new_tokens=8)
LONG = 33_000  # tokens: 512 frames of 4 tokens with their labels


@pytest.fixture(scope="module")
def model(demo):
    return ExportedModel(demo / "hf", allow_long_prompts=True)


@pytest.fixture(scope="module")
def short_export(demo, tmp_path_factory):
    """The same model, trained for prompts of 1,024 tokens as its configuration says."""
    export = tmp_path_factory.mktemp("short") / "hf"
    export.mkdir()
    for file in (demo / "hf").iterdir():
        if file.name != "config.json":
            (export / file.name).symlink_to(file)
    config = json.loads((demo / "hf" / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1024
    (export / "config.json").write_text(json.dumps(config))
    return export


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    return {
        "long": write_video(folder / "long.mp4", frames=600),
        "short": write_video(folder / "short.mp4", frames=12),
        "picture": write_picture(folder / "4k.png", 3840, 2160),
    }


def ids_of(model, request, sampling):
    return model._inputs(request, sampling)["input_ids"][0].tolist()


def test_limits_are_lowered_alike(short_export, media, tmp_path):
    """A server of the trained length: what it shows is what `generate` and `evaluate` show of the export."""
    log, model = tmp_path / "lowered.log", ExportedModel(short_export)
    length = model.max_positions
    long, short = ({"video": media[name], "fps": 10, "max_frames": 5000} for name in ("long", "short"))
    tiled = {"max_tiles": 4000, "frame_tiles": 5000}
    requests = [
        Request("What happens?", (), (long,)),
        Request("What happens?", (), (short, long)),
        Request("What is shown?", (media["picture"],), (long,), max_tiles=48),
        Request("What is shown?", (media["picture"],) * 6, max_tiles=48),
        Request("What is shown?", (media["picture"],), (short,), **tiled),
    ]
    ours = [ids_of(model, request, SHORT) for request in requests]
    assert all(len(ids) + SHORT.max_new_tokens <= length for ids in ours)
    assert min(map(len, ours[:3])) > length - 100 and len(ours[3]) > length - 200  # as many as fit
    with running(short_export, log, length=length) as url:
        served = ServedModel(url)
        assert [ask(url, served.body(request, SHORT))[0] for request in requests] == ours
        # Another answer, another room; without a word 512 tokens, or a quarter.
        for answer in (1, 10**6):
            sampling = Sampling(max_new_tokens=answer)
            body = served.body(requests[0], sampling) | {"max_tokens": min(answer, length)}
            assert ask(url, body)[0] == ids_of(model, requests[0], sampling)
        body = {k: v for k, v in served.body(requests[0], SHORT).items() if k != "max_tokens"}
        assert ask(url, body | {"max_tokens": None})[0] == ids_of(model, requests[0], Sampling())
        with pytest.raises(RuntimeError, match=r"400: .*nframes is 4000; a prompt of this server holds"):
            ask(url, served.body(Request("?", (), ({"video": media["long"], "nframes": 4000},)), SHORT))
        scores = evaluated(tmp_path, media["long"], "--endpoint", url)
    assert scores == evaluated(tmp_path, media["long"], "--hf", short_export)
    assert log.read_text().count("Prompts show fewer frames or tiles than requests ask for") == 1


def evaluated(folder, video, option, value):
    """Answers of a benchmark of one question, with more frames than fit."""
    path, output = folder / "b.jsonl", folder / option.strip("-")
    question = {"id": "1", "question": "What happens?", "answer": "x", "metric": "exact", "videos": [video]}
    path.write_text(json.dumps(question) + "\n")
    common = [
        "--benchmark",
        path,
        "--output",
        output,
        "--fps",
        10,
        "--max-frames",
        5000,
        "--max-new-tokens",
        8,
    ]
    evaluate.main(list(map(str, ["run", option, value, *common])))
    return [json.loads(line) for line in (output / "answers.jsonl").open()][1:]


@pytest.fixture(scope="module")
def long_url(demo):
    with running(demo / "hf", demo / "long.log", length=LONG) as url:
        yield url


def seen(url, body):
    """Ids of a prompt, and what the server made of its media."""
    number = secrets.token_hex(16)
    asked = {**body.get("mm_processor_kwargs", {}), "seen": number}
    ids, _ = ask(url, body | {"mm_processor_kwargs": asked})
    with urllib.request.urlopen(f"{url}/v1/export/seen/{number}") as response:
        return ids, json.load(response)["media"]


def test_512_frames(long_url, model, media):
    """Without a word of them: the demo's data were sampled with at most 512."""
    assert model.processor.max_frames == 512
    request = Request("What happens?", (), ({"video": media["long"], "fps": 10},))
    ids, (video,) = seen(long_url, ServedModel(long_url).body(request, SHORT))
    assert len(video["frames"]) == 512
    assert ids == ids_of(model, request, SHORT)
    assert len(re.findall("Frame [0-9]+ sample at", model.processor.decode(ids))) == 512


def test_a_4k_picture_in_48_tiles(long_url, model, media):
    request = Request("What is shown?", (media["picture"],), max_tiles=48)
    ids, (picture,) = seen(long_url, ServedModel(long_url).body(request, SHORT))
    columns, rows = model.processor.image_processor.grid(3840, 2160, max_dynamic_tiles=48)
    assert picture["grids"] == [[columns, rows]] and picture["tiles"] == [columns * rows + 1]
    assert 36 < columns * rows <= 48
    assert ids == ids_of(model, request, SHORT)
    twelve, (picture,) = seen(long_url, ServedModel(long_url).body(Request("?", (media["picture"],)), SHORT))
    assert picture["tiles"][0] <= 13 and len(twelve) < len(ids)
