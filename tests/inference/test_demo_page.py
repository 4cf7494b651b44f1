"""tools/serve_demo.py: uploads, their limits, streamed answers; the page in a headless Chromium."""

import http.client
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import uvicorn

from megatron_eagle.inference.demo import Demo, make_app
from megatron_eagle.inference.demo_media import Limits, Viewer
from megatron_eagle.inference.generate import ExportedModel, Request, Sampling
from megatron_eagle.inference.server_client import ServedModel
from tests.convert.hf_folder import TOKENS_PER_TILE
from tests.convert.media import write_picture, write_video
from tests.data.helpers import make_pdf, make_video
from tests.inference.test_serving import protocol_server
from tests.paths import REPO

TOOL = REPO / "tools" / "serve_demo.py"
LIMITS = Limits(megabytes=1, pixels=500_000, frame_pixels=96 * 64, pages=4, seconds=15)


class SlowModel:
    """Counts until it is stopped, or to `end`."""

    end = 5
    error = None

    def answer(self, request, sampling, *, on_text=None):
        if self.error:
            raise self.error
        for k in range(self.end):
            on_text(f"{k} ")
            time.sleep(0.01)


class Live:
    """A demo on a free port of this machine."""

    def __init__(self, model, processor, sampling=Sampling(max_new_tokens=8, max_frames=8)):  # noqa: B008
        self.demo = Demo(model, Viewer(processor, sampling, LIMITS), {"model": "tiny", "token_limit": 4096})
        config = uvicorn.Config(make_app(self.demo, local=True), port=0, log_level="error")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join()

    def ask(self, method, path, body=None, **headers):
        """Status and text of a reply."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()

    def upload(self, path):
        status, text = self.ask("POST", "/media", Path(path).read_bytes())
        return status, json.loads(text)

    def answer(self, prompt, *media, turns=()):
        question = json.dumps({"prompt": prompt, "media": media, "turns": turns})
        status, text = self.ask("POST", "/ask", question, **{"Content-Type": "application/json"})
        assert status == 200, text
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def model(exported):
    return ExportedModel(exported)


@pytest.fixture(scope="module")
def live(model):
    with Live(model, model.processor) as running:
        yield running


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    picture = write_picture(folder / "p.png", 300, 200)
    return picture, write_video(folder / "v.mp4"), str(make_pdf(folder / "d.pdf", 2))


@pytest.fixture
def slow(model):
    slow_model = SlowModel()
    with Live(slow_model, model.processor) as running:
        yield running, slow_model


def test_uploads_are_shown_as_the_model_sees_them(live, model, media):
    picture, video, document = media
    shown = []
    for path in media:
        status, reply = live.upload(path)
        assert status == 200, reply
        shown.append(reply)
    image, frames, pages = shown
    assert [entry["kind"] for entry in shown] == ["image", "video", "document"]
    assert image["summary"] == "300 x 200 pixels, 3 x 2 tiles and the whole"
    assert [p["label"] for p in image["pieces"]] == [
        *(f"row {r}, column {c}" for r in (1, 2) for c in (1, 2, 3)),
        "whole",
    ]
    assert len(frames["pieces"]) == 6 and frames["pieces"][1]["label"] == "0.60 s"
    assert [p["label"] for p in pages["pieces"]] == ["page 1: 2 x 3 tiles", "page 2: 2 x 3 tiles"]
    assert all(p["picture"].startswith("data:image/jpeg;base64,") for entry in shown for p in entry["pieces"])
    for entry, request in (
        (image, Request("a", (picture,))),
        (frames, Request("a", (), (video,))),
        (pages, Request("a", documents=(document,))),
    ):  # what is promised is what the model gets
        inputs = model._inputs(request, live.demo.viewer.sampling)
        assert entry["visual_tokens"] == len(inputs["pixel_values"]) * TOKENS_PER_TILE


def test_the_answer_is_that_of_generate(live, model, media):
    ids = [live.upload(path)[1]["id"] for path in media]
    turns = [("What?", "A cat.")]
    events = live.answer("Describe.", *ids, turns=turns)
    picture, video, document = media
    request = Request("Describe.", (picture,), (video,), documents=(document,), turns=tuple(turns))
    text = "".join(event.get("text", "") for event in events).strip()
    assert text and text == model.answer(request, live.demo.viewer.sampling)
    inputs = model._inputs(request, live.demo.viewer.sampling)
    visual = len(inputs["pixel_values"]) * TOKENS_PER_TILE
    assert events[0] == {"prompt": {"visual": visual, "text": inputs["input_ids"].shape[1] - visual}}
    assert events[-1] == {"done": True}


def test_what_is_over_a_limit_or_no_media_is_one_line(live, tmp_path):
    def written(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    pdf = make_pdf(tmp_path / "cut.pdf", 2).read_bytes()
    for path, message in [
        (written("empty", b""), "the file is empty"),
        (written("large.png", bytes(2**20 + 1)), "the file has more than 1 MB"),
        (written("text.png", b"hello"), "neither a picture"),
        (written("list.m3u8", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"), "neither a picture"),
        (written("list.mp4", b"ffconcat version 1.0\nfile /etc/passwd\n"), "neither a picture"),
        (written("cut.pdf", pdf[:-200]), "truncated document: the file lacks the mark"),
        (make_pdf(tmp_path / "long.pdf", 5), "the file has 5 pages, the limit is 4"),
        (write_picture(tmp_path / "wide.jpg", 1000, 501), "1000 x 501 pixels, limit 0.5 megapixels"),
        (write_video(tmp_path / "long.mp4", 25, 1), "the video takes 0.4 minutes, limit 0.25"),
        (make_video(tmp_path / "wide.mp4"), "pixels, limit 0.006144 megapixels"),
        (written("cut.mp4", Path(write_video(tmp_path / "v.mp4")).read_bytes()[:400]), "cannot be read"),
    ]:
        status, reply = live.upload(path)
        assert status == 400 and message in reply["error"], (path, reply)
        assert "\n" not in reply["error"] and str(live.demo.folder) not in reply["error"]
    kept = {path.name for path in live.demo.folder.iterdir()}
    assert kept == set(live.demo.uploads)  # nothing of a refused file stays


def test_bad_questions_are_one_line(live, slow, media):
    assert live.answer("a", "../../etc/passwd")[-1] == {"error": "an upload is gone: upload it again"}
    name = live.upload(media[0])[1]["id"]
    assert live.answer("see <image-2>", name)[-1]["error"].startswith("the prompt asks for <image-2>")
    assert live.ask("DELETE", f"/media/{name}")[0] == 200 and not (live.demo.folder / name).exists()
    assert "gone" in live.answer("a", name)[-1]["error"]
    status, text = live.ask("POST", "/ask", '{"prompt": 3}', **{"Content-Type": "application/json"})
    assert status == 400 and "malformed" in json.loads(text)["error"]
    running, model = slow
    model.error = RuntimeError("out of memory\nmore")
    assert running.answer("a") == [{"error": "RuntimeError: out of memory"}]
    model.error = None
    assert running.answer("a")[-1] == {"done": True}


def test_a_prompt_beyond_the_models_positions(live, model, media, monkeypatch, capsys):
    monkeypatch.setattr(model.model.config.text_config, "max_position_embeddings", 20)
    name = live.upload(media[0])[1]["id"]
    counted, refused = live.answer("What?", name)
    assert sum(counted["prompt"].values()) > 20 and "the model was trained for 20 " in refused["error"]
    monkeypatch.setattr(model, "allow_long_prompts", True)
    assert live.answer("What?", name)[-1] == {"done": True}
    assert "go beyond the 20 that the model was trained for" in capsys.readouterr().err


def test_the_page_knows_the_servers_limit_and_the_models(exported, monkeypatch, capsys):
    """The served 5,000 tokens go beyond the 4,096 of the export."""
    shown = []
    monkeypatch.setattr(
        "megatron_eagle.commands.serve.make_app", lambda demo, local: shown.append(demo.about)
    )
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: None)
    with protocol_server() as (url, _):
        for folder in ((), ("--hf", str(exported))):
            monkeypatch.setattr("sys.argv", ["serve_demo.py", "--endpoint", url, *folder])
            with pytest.raises(SystemExit):
                runpy.run_path(str(TOOL), run_name="__main__")
    assert [about["token_limit"] for about in shown] == [5000, 4096]
    assert capsys.readouterr().err.count("which the server takes, go beyond the 4,096 that") == 1


def test_other_sites_and_other_names_are_refused(live):
    assert live.ask("POST", "/stop", Origin="http://elsewhere.example")[0] == 403
    assert live.ask("GET", "/", Host="elsewhere.example")[0] == 400
    assert live.ask("POST", "/stop", Origin=f"http://127.0.0.1:{live.port}")[0] == 200
    status, page = live.ask("GET", "/")
    assert status == 200 and not re.search(r"(src|href)=|https?://", page)  # nothing from outside


def test_one_answer_at_a_time_and_it_can_be_stopped(slow):
    running, model = slow
    model.end = 10_000
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    connection.request("POST", "/ask", '{"prompt": "a"}', {"Content-Type": "application/json"})
    reply = connection.getresponse()
    assert json.loads(reply.readline()) == {"text": "0 "}  # while it is made
    assert running.answer("b")[0]["error"].startswith("another answer is being made")
    running.ask("POST", "/stop")
    assert json.loads(reply.read().splitlines()[-1]) == {"stopped": True}
    # A reader who leaves frees the model, too.
    connection.request("POST", "/ask", '{"prompt": "a"}', {"Content-Type": "application/json"})
    assert json.loads(connection.getresponse().readline()) == {"text": "0 "}
    connection.close()
    model.end = 3
    deadline = time.monotonic() + 20
    while "error" in (events := running.answer("c"))[0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert events[-1] == {"done": True}


def test_without_a_processor_the_frames_are_shown_and_no_tokens(model, media):
    viewer = Viewer(None, Sampling(max_frames=4), LIMITS)
    shown = [viewer.look(Path(path)) for path in media]
    assert [len(entry.pieces) for entry in shown] == [1, 4, 2]
    assert [entry.visual_tokens for entry in shown] == [None] * 3


def test_an_endpoint_answers_in_place_of_a_model(media):
    with protocol_server() as (url, requests), Live(ServedModel(url), None) as running:
        ids = [running.upload(path)[1]["id"] for path in media]
        events = running.answer("What?", *ids)
    assert "".join(event.get("text", "") for event in events) == "9 pictures, What?"  # 1 + 6 frames + 2 pages
    assert events[-1] == {"done": True} and requests[-1]["stream"]


def test_the_tool_warns_serves_and_leaves_nothing(exported, tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, TOOL, "--hf", exported, "--port", "0", "--host", "0.0.0.0"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "running on" in line:
                break
        assert lines[0].startswith("warning: --host 0.0.0.0: everybody"), lines
        assert list(tmp_path.glob("eagle-demo-*"))
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
    assert not list(tmp_path.glob("eagle-demo-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --hf H, --endpoint URL, or both"),
        (("--hf", "nowhere"), "no such folder"),
        (("--hf", "nowhere", "--model", "m"), "it needs --endpoint"),
        (("--hf", "nowhere", "--max-pages", "0"), "--max-pages 0 is not positive"),
        (("--endpoint", "http://127.0.0.1:9", "--allow-long-prompts"), "the server's own setting"),
    ],
)
def test_bad_options_are_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["serve_demo.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(TOOL), run_name="__main__")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_the_page_in_a_browser(live, media):
    """Screenshots go to the folder that MEGATRON_EAGLE_SCREENSHOTS names."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as kit, tempfile.TemporaryDirectory() as folder:
        browser = kit.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else 0)
        page.goto(f"http://127.0.0.1:{live.port}/")
        page.set_input_files("#file", list(media))
        cards = page.locator(".card")
        playwright.expect(cards).to_have_count(3)
        labels = page.locator("figure").all_inner_texts()
        assert len(labels) == 7 + 6 + 2 and "0.60 s" in labels and "row 2, column 3" in labels
        widths = [picture.evaluate("image => image.naturalWidth") for picture in page.locator("img").all()]
        assert all(widths)
        assert "visual tokens · limit 4,096" in page.inner_text("#tokens")
        page.fill("#prompt", "What is shown?")
        page.click("#ask")
        page.wait_for_selector("#ask:enabled")
        answer = page.inner_text(".said.model")
        assert answer.strip() and "of text and labels" in page.inner_text("#tokens")
        page.fill("#prompt", "And then?")
        page.press("#prompt", "Enter")
        playwright.expect(page.locator(".said.user")).to_have_count(2)
        page.wait_for_selector("#ask:enabled")
        assert problems == []
        bad = Path(folder) / "notes.txt"
        bad.write_text("no picture")
        page.set_input_files("#file", str(bad))
        page.wait_for_selector("#upload-error:visible")
        assert page.inner_text("#upload-error").startswith("notes.txt: neither a picture")
        if target := os.environ.get("MEGATRON_EAGLE_SCREENSHOTS"):
            page.screenshot(path=Path(target) / "demo.png")
        page.locator(".card button").first.click()
        playwright.expect(cards).to_have_count(2)
        page.click("#new")
        assert page.locator(".said").count() == 0
        browser.close()
