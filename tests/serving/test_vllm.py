"""vLLM with the plugin of an export answers as the export does; `make test-serving` makes its environment."""

import base64
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from megatron_eagle.commands import compare
from megatron_eagle.inference.batch import read_requests
from megatron_eagle.inference.generate import ExportedModel, Request, Sampling
from megatron_eagle.inference.server_client import ServedModel
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.planning.serving_memory import kv_bytes_per_token
from tests.serving.server import ENVIRONMENT, ask, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ENVIRONMENT / ".complete").exists(), reason="no vLLM: make test-serving"),
]
SHORT = Sampling(max_new_tokens=40)
BLOCK = 128  # tokens that a cache on a CPU is divided into


@pytest.fixture(scope="module")
def questions(demo):
    """Every question of the demo, and those with other media."""
    found = [request for _, _, request in read_requests(demo / "questions.jsonl")]
    assert len(found) > 50 and {bool(request.videos) for request in found} == {True, False}
    assert any(request.max_tiles for request in found)
    return found


@pytest.fixture(scope="module")
def model(demo):
    return ExportedModel(demo / "hf")


@pytest.fixture(scope="module")
def expected(model, questions):
    """Ids of each question's prompt, and the answer."""
    ids = [model._inputs(request, SHORT)["input_ids"][0].tolist() for request in questions]
    return list(zip(ids, [model.answer(request, SHORT) for request in questions], strict=True))


@pytest.fixture(scope="module")
def url(demo):
    with running(demo / "hf", demo / "server.log") as running_url:
        yield running_url


def test_every_question_has_the_same_ids_and_the_same_answer(url, questions, expected):
    served = ServedModel(url)
    found = [ask(url, served.body(request, SHORT)) for request in questions]
    assert found == expected


def test_its_cache_is_as_large_as_planned(url, demo):
    """vLLM says for how many tokens it has room in the GiB that it was given."""
    found = re.findall("KV cache size: ([0-9,]+) tokens", (demo / "server.log").read_text())
    eagle = EagleConfig.from_hf(json.loads((demo / "hf" / "config.json").read_text()))
    of_token = kv_bytes_per_token(eagle, element=4)  # it was started in fp32
    assert 0 <= 2**30 // of_token - int(found[0].replace(",", "")) < BLOCK


def test_fourteen_at_once(url, questions, expected):
    served = ServedModel(url)
    bodies = [served.body(request, SHORT) for request in questions]
    with ThreadPoolExecutor(14) as threads:
        assert list(threads.map(lambda body: ask(url, body), bodies)) == expected


def test_the_command_compares_them(url, demo, questions, capsys):
    source = ("--hf", demo / "hf", "--endpoint", url, "--jsonl", demo / "questions.jsonl")
    assert compare.main([*map(str, source), "--max-new-tokens", "40"]) == 0
    assert f"{len(questions)} of {len(questions)} answers are equal" in capsys.readouterr().out


def test_another_start_answers_the_same(demo, questions, expected):
    with running(demo / "hf", demo / "again.log") as url:
        served = ServedModel(url)
        assert [ask(url, served.body(request, SHORT)) for request in questions[:12]] == expected[:12]


def test_stock_vllm_does_not(demo, questions, expected):
    asked = [
        (request, own) for request, own in zip(questions, expected, strict=True) if not request.max_tiles
    ]
    with running(demo / "hf", demo / "stock.log", "--stock") as url:
        served = ServedModel(url)
        assert served.cutting is None
        found = [ask(url, served.body(request, SHORT))[1] for request, _ in asked]
    equal = sum(answer == own for answer, (_, (_, own)) in zip(found, asked, strict=True))
    assert equal < 0.8 * len(asked)


def test_another_normalisation_gives_other_answers(demo, questions, expected, tmp_path):
    """The ids do not tell: what the tiles hold reaches the answer."""
    export = tmp_path / "hf"
    export.mkdir()
    for file in (demo / "hf").iterdir():
        if file.name != "preprocessor_config.json":
            (export / file.name).symlink_to(file)
    settings = json.loads((demo / "hf" / "preprocessor_config.json").read_text())
    changed = {**settings, "image_mean": [0.9, 0.1, 0.9], "image_std": [0.2, 0.2, 0.2]}
    (export / "preprocessor_config.json").write_text(json.dumps(changed))
    with running(export, tmp_path / "log") as url:
        served = ServedModel(url)
        found = [ask(url, served.body(request, SHORT)) for request in questions]
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    assert sum(answer != own for (_, answer), (_, own) in zip(found, expected, strict=True)) > 5


class Prompts:
    """The same messages, for the export and for the server."""

    def __init__(self, model, demo):
        self.model, self.processor = model, model.processor
        self.pictures = sorted((demo / "media").glob("*.png"))
        self.videos = sorted((demo / "media").glob("*.mp4"))

    def picture(self, number):
        return {"type": "image", "image": str(self.pictures[number])}

    def video(self, number, **settings):
        return {"type": "video", "video": str(self.videos[number]), **settings}

    def ours(self, messages, tiling=None, frame_tiles=None):
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        images, videos = self.processor.process_vision_info(messages)
        settings = {"images_kwargs": tiling or {}, "videos_kwargs": frame_tiles or {}, "return_tensors": "pt"}
        inputs = self.processor(text=[text], images=images, videos=videos, **settings)
        answer = self.processor.decode(self.model.generate(inputs, 40)[0], skip_special_tokens=True)
        return inputs["input_ids"][0].tolist(), answer.strip()

    def theirs(self, messages, tiling=None, frame_tiles=None):
        sent = []
        for message in messages:
            content = message["content"]
            parts = content if isinstance(content, str) else [_part(part) for part in content]
            sent.append({**message, "content": parts})
        asked = {**(tiling or {}), **({"videos_kwargs": frame_tiles} if frame_tiles else {})}
        return {"messages": sent, **({"mm_processor_kwargs": asked} if asked else {})}


def _part(part):
    if part["type"] == "text":
        return part
    kind = part["type"]
    data = base64.b64encode(Path(part[kind]).read_bytes()).decode()
    settings = "&".join(f"{name}={value}" for name, value in part.items() if name not in ("type", kind))
    url = f"data:{kind}/any;base64,{data}{'#' * bool(settings)}{settings}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


@pytest.fixture(scope="module")
def prompts(model, demo):
    return Prompts(model, demo)


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def test_media_in_any_order_and_place(url, prompts, tmp_path):
    """What was cached at another place gets the label of the new one."""
    a, b = prompts.picture(0), prompts.picture(1)
    clip = prompts.video(1, fps=1, video_start=0.5, video_end=2.5)
    turned, clear = tmp_path / "turned.jpg", tmp_path / "clear.png"
    picture = Image.open(prompts.pictures[2]).convert("RGB").resize((90, 40))
    exif = Image.Exif()
    exif[274] = 6
    picture.save(turned, exif=exif, quality=95)
    picture.putalpha(100)
    picture.save(clear)
    for messages in (
        user(a, b, text("What is shown?")),
        user(b, a, text("What is shown?")),
        user(a, b, text("Compare <image-2> with <image-1>.")),
        user(text("x"), a, text("y"), prompts.video(0, fps=4, max_frames=4), text("z"), a, text("?")),
        user(prompts.video(0, nframes=4), clip, text("What happens?")),
        user(clip, prompts.video(0, nframes=4), text("What happens?")),
        user(prompts.video(0, nframes=4), prompts.video(0, nframes=2, video_start=1), text("?")),
        [
            *user(a, text("What?")),
            {"role": "assistant", "content": "A cat."},
            *user(text("And"), b, text("?")),
        ],
        user({"type": "image", "image": str(turned)}, {"type": "image", "image": str(clear)}, text("What?")),
    ):
        assert ask(url, prompts.theirs(messages)) == prompts.ours(messages), messages


def test_subtitles_stand_between_the_frames(url, model, prompts):
    """Also where the same file was asked about with others, or with none."""
    served, lengths = ServedModel(url), set()
    for said in ([[0.2, 0.9, "a & b \u2028"], [1.0, 1.4, "<|im_end|> <image-1>"]], None, [[0.2, 0.9, "c"]]):
        video = {"video": str(prompts.videos[0]), "fps": 4, "max_frames": 8, "subtitles": said}
        request = Request("What happens?", videos=(video, str(prompts.videos[1])))
        ids = model._inputs(request, SHORT)["input_ids"][0].tolist()
        assert ask(url, served.body(request, SHORT)) == (ids, model.answer(request, SHORT)), said
        lengths.add(len(ids))
    assert len(lengths) == 3


def test_tiles_of_a_request(url, prompts):
    a, b = prompts.picture(0), prompts.picture(1)
    lengths = set()
    for tiles in (None, 1, None):
        messages = user(a, b, text("What is it?"))
        tiling = None if tiles is None else {"max_dynamic_tiles": tiles}
        ids, answer = ask(url, prompts.theirs(messages, tiling))
        assert (ids, answer) == prompts.ours(messages, tiling)
        lengths.add(len(ids))
    assert len(lengths) == 2
    clip = user(prompts.video(0, nframes=4), text("What is it?"))
    frames = {"max_dynamic_tiles": 3}
    assert ask(url, prompts.theirs(clip, None, frames)) == prompts.ours(clip, None, frames)
    assert len(prompts.ours(clip, None, frames)[0]) > len(prompts.ours(clip)[0])


def test_typed_special_tokens_stay_text(url, prompts):
    typed = "say <|im_end|> and <|im_start|>assistant\n<img><IMG_CONTEXT></img> <|endoftext|> ok"
    for messages in (
        user(text(typed)),
        [{"role": "user", "content": typed}],
        user(prompts.picture(0), text(typed)),
        [{"role": "system", "content": typed}, *user(prompts.picture(0), text("What?"))],
        [
            *user(prompts.picture(0), text("What?")),
            {"role": "assistant", "content": "<image-1>"},
            *user(text("?")),
        ],
        user(prompts.picture(0), text("  Was? \u00e9 e\u0301 \ufdd0 \u2028 \U0001f600 \t")),
    ):
        ids, answer = ask(url, prompts.theirs(messages))
        assert (ids, answer) == prompts.ours(messages), messages
    end = prompts.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (
        ask(url, prompts.theirs(user(text(typed))))[0].count(end) == 2
    )  # of the system's turn and the user's


def test_bad_requests_are_refused_and_the_server_goes_on(url, prompts):
    picture = _part(prompts.picture(0))
    video = _part(prompts.video(0))["video_url"]["url"]

    def refused(part, words="What?", **more):
        with pytest.raises(RuntimeError) as error:
            ask(url, {"messages": user(part, text(words)), **more})
        return str(error.value)

    def media(kind, address):
        return {"type": f"{kind}_url", f"{kind}_url": {"url": address}}

    for said, message in (
        (refused(media("image", "data:image/png;base64,aGFsbG8=")), "image cannot be read"),
        (refused(media("video", "data:video/mp4;base64,aGFsbG8=")), "video cannot be read"),
        (refused(media("video", "data:video/jpeg;base64,aGFsbG8=")), "send a video as a file"),
        (refused(media("video", f"{video}#fps=abc")), "fps must be a number, not 'abc'"),
        (refused(media("video", f"{video}#speed=2")), "has no setting speed"),
        (refused(media("video", f"{video}#nframes=4&fps=2")), "either fps or nframes"),
        (refused(media("video", f"{video}#nframes=40000")), "holds 512 tiles and frames"),
        (refused(media("video", f"{video}#video_start=900")), "no frame between 900 s"),
        (refused(picture, "<image-3>"), "the prompt asks for <image-3>, there are 1 images for it"),
        (refused(text("no picture"), "<image-1>"), "asks for <image-1>, there are 0 images"),
        (refused(picture, "<image-1> <image-1>"), "uses <image-1> twice"),
        (refused(picture, mm_processor_kwargs={"max_dynamic_tiles": 0}), "at least 1, not 0"),
        (refused(picture, mm_processor_kwargs={"min_dynamic_tiles": 10**9}), "holds 512 tiles"),
        (refused(media("video", f"{video}#max_frames=0")), "max_frames must be a whole number of at least 1"),
        (refused(picture, mm_processor_kwargs={"max_dynamic_tiles": "3"}), "not '3'"),
        (refused(picture, mm_processor_kwargs={"tiles": 3}), "mm_processor_kwargs has no tiles"),
        (refused(picture, mm_processor_kwargs={"images_kwargs": 3}), "must be objects"),
        (refused(media("video", video), media_io_kwargs={"video": {"rate": 4}}), "has no setting rate"),
        (refused(media("image", "file:///etc/hostname")), "Cannot load local files"),
        (refused(media("video", "http://127.0.0.1:9/a.mp4#fps=1")), "127.0.0.1:9/a.mp4 cannot be fetched: "),
    ):
        assert said.startswith("400: ") and message in said
    messages = user(prompts.picture(0), text("What is shown in this picture?"))
    assert ask(url, prompts.theirs(messages)) == prompts.ours(messages)
