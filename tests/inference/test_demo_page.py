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
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn

from megatron_eagle.inference.demo import Demo, make_app
from megatron_eagle.inference.demo_media import Limits, Viewer, request_of
from megatron_eagle.inference.generate import ExportedModel, Request, Sampling
from megatron_eagle.inference.server_client import ServedModel
from tests.convert.hf_folder import TILE, TOKENS_PER_TILE
from tests.convert.media import write_picture, write_video
from tests.data.helpers import make_pdf, write_pdf
from tests.inference.test_serving import protocol_server
from tests.paths import REPO

TOOL = REPO / "tools" / "serve_demo.py"
JSON = {"Content-Type": "application/json"}
LIMITS = Limits(megabytes=1, pixels=500_000, pages=4, seconds=15)


NO_PAGES = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Count 0/Kids[]>>"]
LOST_PAGE = [
    b"<</Type/Catalog/Pages 2 0 R>>",
    b"<</Type/Pages/Count 2/Kids[3 0 R 9 0 R]/MediaBox[0 0 90 90]>>",
    b"<</Type/Page/Parent 2 0 R>>",
]


def locked_pdf(path):
    """A file that says it is encrypted, by keys that no password gives."""
    encrypted = f"<</Filter/Standard/V 1/R 2/P -4/O<{'00' * 32}>/U<{'00' * 32}>>>"
    return make_pdf(path, extra=f"/Encrypt {encrypted}/ID[<00><00>]")


class SlowModel:
    """Counts until it is stopped, or to `end`."""

    end = 5
    error = None

    def answer(self, request, sampling, *, on_text=None, on_read=None):
        if self.error:
            raise self.error
        on_read()
        for k in range(self.end):
            on_text(f"{k} ")
            time.sleep(0.01)


class Live:
    """A demo on a free port of this machine."""

    def __init__(self, model, processor, sampling=Sampling(max_new_tokens=8, max_frames=8)):  # noqa: B008
        about = {"model": "tiny", "token_limit": 4096}
        self.demo = Demo(model, Viewer(processor, sampling, LIMITS), about, 4096)
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
        """Events of an answer but its name, or the one line of a refusal."""
        question = json.dumps({"prompt": prompt, "media": media, "turns": turns})
        status, text = self.ask("POST", "/ask", question, **JSON)
        events = [json.loads(line) for line in text.splitlines()]
        if status == 200:
            assert len(events.pop(0)["answer"]) == 32
        else:
            assert [*events[0]] == ["error"] and len(events) == 1
        return events

    def begin(self):
        """A running answer: its name and the reply, whose first word is read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/ask", '{"prompt": "a"}', JSON)
        reply = connection.getresponse()
        name, counted, text = (json.loads(reply.readline()) for _ in range(3))
        assert counted["prompt"]["visual"] == 0 and text == {"text": "0 "}  # while it is made
        return name["answer"], reply, connection


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
    assert image["summary"] == "300 x 200 pixels, 3 x 2 tiles and the thumbnail"
    assert [p["label"] for p in image["pieces"]] == [
        *(f"row {r}, column {c}" for r in (1, 2) for c in (1, 2, 3)),
        "thumbnail: the whole picture",
    ]
    assert image["grid"] == [3, 2] and frames["grid"] is None
    assert len(frames["pieces"]) == 6 and frames["pieces"][1]["label"] == "0.60 s"
    assert [p["label"] for p in pages["pieces"]] == ["page 1: 2 x 3 tiles", "page 2: 2 x 3 tiles"]
    assert [p["grid"] for p in pages["pieces"]] == [[2, 3]] * 2
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
        (make_pdf(tmp_path / "long.pdf", 5), "the file has 5 pages, the limit is 4 (--max-pages)"),
        (written("empty.pdf", b"%PDF-1.4\n%%EOF\n"), "unreadable document: the file: "),
        (write_pdf(tmp_path / "bare.pdf", NO_PAGES), "Failed to load document"),
        (write_pdf(tmp_path / "lost.pdf", LOST_PAGE), "unreadable document: page 2 of the file: "),
        (locked_pdf(tmp_path / "locked.pdf"), "encrypted document: the file needs a password"),
        (write_picture(tmp_path / "wide.jpg", 1000, 501), "1000 x 501 pixels, limit 0.5 megapixels"),
        (write_video(tmp_path / "long.mp4", 25, 1), "the video takes 0.4 minutes, limit 0.25"),
        (written("cut.mp4", Path(write_video(tmp_path / "v.mp4")).read_bytes()[:400]), "cannot be read"),
    ]:
        status, reply = live.upload(path)
        assert status == 400 and message in reply["error"], (path, reply)
        assert "\n" not in reply["error"] and str(live.demo.folder) not in reply["error"]
    kept = {path.name for path in live.demo.folder.iterdir()}
    assert kept == set(live.demo.uploads)  # nothing of a refused file stays


def test_bad_questions_are_one_line(live, slow, media, monkeypatch):
    gone = [{"error": "an upload is gone: remove it and upload it again"}]
    assert live.answer("a", "../../etc/passwd") == gone
    name = live.upload(media[0])[1]["id"]
    assert live.answer("see <image-2>", name)[-1]["error"].startswith("the prompt asks for <image-2>")
    assert live.ask("DELETE", f"/media/{name}")[0] == 200 and not (live.demo.folder / name).exists()
    assert live.answer("a", name) == gone
    for body, message in (
        ('{"prompt": 3}', "the question is malformed: prompt: Input should be a valid string"),
        ("{", "the question is malformed: "),
        (json.dumps({"prompt": "a", "turns": [["a", "b"]] * 65}), "too many turns: begin a new chat"),
    ):
        status, text = live.ask("POST", "/ask", body, **JSON)
        assert status == 400 and message in json.loads(text)["error"], text
    running, model = slow
    model.error = RuntimeError("out of memory\nmore")
    assert running.answer("a")[-1] == {"error": "RuntimeError: out of memory"}
    model.error = None
    assert running.answer("a")[-1] == {"done": True}
    monkeypatch.setattr("megatron_eagle.inference.demo_media._kind", lambda path: 1 / 0)
    assert running.upload(media[0]) == (
        400,
        {"error": "the file cannot be read: ZeroDivisionError: division by zero"},
    )


def test_a_prompt_beyond_the_limit(live, model, media, monkeypatch, capsys):
    name = live.upload(media[0])[1]["id"]
    [exact, *_] = live.answer("What?", name)
    tokens = sum(exact["prompt"].values())
    monkeypatch.setattr(live.demo, "prompt_limit", tokens)
    assert live.answer("What?", name)[-1] == {"done": True}
    monkeypatch.setattr(live.demo, "prompt_limit", tokens - 1)
    refused = f"the prompt has {tokens} tokens, {exact['prompt']['visual']} of them visual, and the limit is"
    with monkeypatch.context() as nothing_read:
        nothing_read.setattr(model, "answer", None)
        [line] = live.answer("What?", name)
    assert line["error"].startswith(refused)
    # What the model itself refuses comes in the stream.
    monkeypatch.setattr(live.demo, "prompt_limit", None)
    monkeypatch.setattr(model.model.config.text_config, "max_position_embeddings", 20)
    assert "the model was trained for 20 " in live.answer("What?", name)[-1]["error"]
    monkeypatch.setattr(model, "allow_long_prompts", True)
    assert live.answer("What?", name)[-1] == {"done": True}
    assert "go beyond the 20 that the model was trained for" in capsys.readouterr().err


def test_what_takes_too_much_memory_is_refused_unread(live, media, monkeypatch):
    picture, video, document = media
    name = live.upload(picture)[1]["id"]
    _, seen = live.demo.uploads[name]
    # One of several is decoded at a time; tiles are four bytes a number.
    tiles = 4 * sum(seen.parts[0].tiles) * TILE**2
    assert [live.demo.viewer.held([seen] * k) for k in (1, 3)] == [60_000 + k * tiles for k in (1, 3)]
    assert replace(live.demo.viewer, processor=None).held([seen] * 3) == 180_000
    limits = replace(LIMITS, question_pixels=60_000 + 2 * tiles)
    monkeypatch.setattr(live.demo, "viewer", replace(live.demo.viewer, limits=limits))
    assert live.answer("a", name, name)[-1] == {"done": True}
    [line] = live.answer("a", name, name, name)
    assert line["error"].startswith("all uploads are ") and "megapixels at once, limit" in line["error"]
    monkeypatch.setattr("megatron_eagle.inference.demo_media.load_video", None)
    limits = replace(LIMITS, question_pixels=6 * 96 * 64 - 1)
    monkeypatch.setattr(live.demo, "viewer", replace(live.demo.viewer, limits=limits))
    assert "6 frames of 96 x 64 pixels are 0.0 megapixels at once" in live.upload(video)[1]["error"]


def test_a_long_video_shows_what_the_model_takes(live, media, tmp_path, monkeypatch):
    """The page's frames are the prompt's; a model that takes more shows all."""
    long, sampling = write_video(tmp_path / "long.mp4", frames=90), Sampling(None, 5000, None, 8)
    viewer = replace(live.demo.viewer, sampling=replace(sampling, fps=10), length=600)
    monkeypatch.setattr(live.demo, "viewer", viewer)
    monkeypatch.setattr(live.demo, "prompt_limit", 600)
    shown = live.upload(long)[1]
    assert 4 <= len(shown["pieces"]) < 90 and shown["summary"].endswith(", as many as the model takes")
    found = live.answer("What happens?", shown["id"])
    assert found[-1] == {"done": True}
    counted = found[0]["prompt"]
    assert counted["visual"] == len(shown["pieces"]) * TOKENS_PER_TILE and sum(counted.values()) < 600
    asked = request_of("What happens?", [live.demo.uploads[shown["id"]]], ())
    frames = live.demo.model._inputs(asked, viewer.sampling)["pixel_values"]
    assert len(frames) == len(shown["pieces"])
    monkeypatch.setattr(live.demo, "viewer", replace(viewer, length=None))
    assert len(live.upload(long)[1]["pieces"]) == 90


def test_one_file_is_decoded_at_a_time(slow, media, monkeypatch):
    """Four uploads and an answer that reads its own; all five are there before the first is read."""
    running, model = slow
    demo, decoding, most = running.demo, [], []
    name = running.upload(media[0])[1]["id"]

    def decode(enough):
        decoding.append(1)
        deadline = time.monotonic() + 20
        while not enough() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.02)
        most.append(len(decoding))
        decoding.pop()

    def look(viewer, path):
        decode(lambda: len(list(demo.folder.iterdir())) == 5 and demo._running)
        return demo.uploads[name][1]

    def answer(request, sampling, *, on_text, on_read):
        decode(lambda: len(list(demo.folder.iterdir())) == 5)
        on_read()
        deadline = time.monotonic() + 20
        while len(most) < 5 and time.monotonic() < deadline:  # the model computes: files are read meanwhile
            time.sleep(0.01)

    monkeypatch.setattr(Viewer, "look", look)
    monkeypatch.setattr(model, "answer", answer, raising=False)
    tasks = [lambda: running.upload(media[0])] * 4 + [lambda: running.answer("a", name)]
    threads = [threading.Thread(target=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5


def test_the_page_knows_the_servers_limit_and_the_models(exported, monkeypatch, capsys):
    """The served 5,000 tokens go beyond the 4,096 of the export. A server without the plugin may count
    otherwise: it refuses by itself."""
    shown = []
    monkeypatch.setattr(
        "megatron_eagle.commands.serve.make_app",
        lambda demo, local: shown.append((demo.about["token_limit"], demo.prompt_limit)),
    )
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: None)
    with protocol_server() as (url, _):
        own, there = ("--hf", str(exported)), ("--endpoint", url)
        for options in (there, (*there, *own), own, (*own, "--allow-long-prompts")):
            monkeypatch.setattr("sys.argv", ["serve_demo.py", *options])
            with pytest.raises(SystemExit):
                runpy.run_path(str(TOOL), run_name="__main__")
    assert shown == [(5000, None), (4096, None), (4096, 4096), (4096, None)]
    assert capsys.readouterr().err.count("which the server takes, go beyond the 4,096 that") == 1


def test_other_sites_and_other_names_are_refused(live):
    assert live.ask("POST", "/stop/a", Origin="http://elsewhere.example")[0] == 403
    assert live.ask("GET", "/", Host="elsewhere.example")[0] == 400
    assert live.ask("POST", "/stop/a", Origin=f"http://127.0.0.1:{live.port}")[0] == 200
    status, page = live.ask("GET", "/")
    assert status == 200 and not re.search(r"(src|href)=|https?://", page)  # nothing from outside


def test_one_answer_at_a_time_and_only_its_own_reader_stops_it(slow):
    running, model = slow
    model.end = 10_000
    name, reply, _ = running.begin()
    status, busy = running.ask("POST", "/ask", '{"prompt": "b"}', **JSON)  # somebody else
    assert status == 409 and json.loads(busy)["error"].startswith("another answer is being made")
    assert running.ask("POST", "/stop")[0] == 404
    assert running.ask("POST", "/stop/" + "0" * 32)[0] == 200  # theirs, which has ended
    for k in range(1, 50):  # goes on
        assert json.loads(reply.readline()) == {"text": f"{k} "}
    running.ask("POST", f"/stop/{name}")
    assert json.loads(reply.read().splitlines()[-1]) == {"stopped": True}
    # A reader who leaves frees the model, too.
    _, reply, connection = running.begin()
    running.ask("POST", f"/stop/{name}")  # the one before
    assert "text" in json.loads(reply.readline())
    reply.close()
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
    assert [len(entry.shown.pieces) for entry in shown] == [1, 4, 2]
    assert [entry.shown.visual_tokens for entry in shown] == [None] * 3


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


# What a browser's own drop or paste makes: a list of files.
DROP = """([target, name, type]) => {
    const data = new DataTransfer(), event = {bubbles: true, cancelable: true};
    data.items.add(new File(["no picture"], name, {type: "image/png"}));
    document.querySelector(target).dispatchEvent(type === "paste" ?
        new ClipboardEvent(type, {clipboardData: data, ...event}) :
        new DragEvent(type, {dataTransfer: data, ...event}));
}"""


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium")
    with (
        playwright.sync_playwright() as kit,
        kit.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as running,
    ):
        yield running, playwright.expect


def test_the_page_in_a_browser(live, media, browser, monkeypatch, tmp_path):
    """Screenshots go to the folder that MEGATRON_EAGLE_SCREENSHOTS names."""
    chromium, expect = browser
    page, problems = chromium.new_page(viewport={"width": 1280, "height": 800}), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else 0)
    page.goto(f"http://127.0.0.1:{live.port}/")
    expect(page.locator("#prompt")).to_be_focused()
    page.set_input_files("#file", list(media))
    cards = page.locator(".card")
    expect(cards).to_have_count(3)
    labels = page.locator("figcaption").all_inner_texts()
    assert len(labels) == 1 + 6 + 2 and labels[0] == "thumbnail: the whole picture" and "0.60 s" in labels
    tiles = [tile.bounding_box() for tile in page.locator(".tiles img").all()]
    assert [tile["x"] for tile in tiles[:3]] == [tile["x"] for tile in tiles[3:]]  # as in the picture
    assert tiles[0]["x"] < tiles[1]["x"] < tiles[2]["x"] and len({tile["y"] for tile in tiles}) == 2
    widths = [picture.evaluate("image => image.naturalWidth") for picture in page.locator("img").all()]
    assert all(widths)
    assert "visual tokens · limit 4,096" in page.inner_text("#tokens")
    page.fill("#prompt", "What is shown?")
    page.click("#ask")
    page.wait_for_selector("#ask:enabled")
    answer = page.inner_text(".said.model")
    assert answer.strip() and "of text and labels" in page.inner_text("#tokens")
    expect(page.locator("#prompt")).to_be_focused()
    page.fill("#prompt", "And then?")
    page.press("#prompt", "Enter")
    expect(page.locator(".said.user")).to_have_count(2)
    page.wait_for_selector("#ask:enabled")
    assert problems == []
    # A refused question stays, and what it is about.
    with monkeypatch.context() as small:
        small.setattr(live.demo, "prompt_limit", 10)
        page.fill("#prompt", "Who?")
        page.press("#prompt", "Enter")
        expect(page.locator("#chat .error")).to_contain_text("and the limit is 10")
    expect(page.locator("#prompt")).to_have_value("Who?")
    expect(page.locator(".said.user")).to_have_count(2)
    expect(cards).to_have_count(3)
    # Files fall anywhere; every one that fails says why, and a name is no HTML.
    name = "<img src=x onerror=alert(1)>.png"
    page.evaluate(DROP, ["#chat", name, "dragover"])
    expect(page.locator("#veil")).to_be_visible()
    page.evaluate(DROP, ["#chat", name, "drop"])
    expect(page.locator("#upload-error")).to_contain_text(f"{name}: neither a picture")
    expect(page.locator("#veil")).to_be_hidden()
    page.evaluate(DROP, ["#prompt", "image.png", "paste"])
    expect(page.locator("#upload-error")).to_contain_text("image.png: neither a picture")
    bad = tmp_path / "notes.txt"
    bad.write_text("no picture")
    page.set_input_files("#file", [str(bad), str(make_pdf(tmp_path / "long.pdf", 5)), str(bad)])
    expect(page.locator("#upload-error div")).to_have_count(3)
    assert page.locator("#upload-error div").nth(1).inner_text() == (
        "long.pdf: the file has 5 pages, the limit is 4 (--max-pages)"
    )
    for width, height in ((1280, 800), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        expect(page.locator("#ask")).to_be_in_viewport()
        if target := os.environ.get("MEGATRON_EAGLE_SCREENSHOTS"):
            page.screenshot(path=Path(target) / f"demo-{width}.png")
    page.locator(".card button").first.click()
    expect(cards).to_have_count(2)
    page.click("#new")
    assert page.locator(".said").count() == 0


def test_stop_in_a_browser_keeps_what_was_said(slow, browser):
    running, model = slow
    model.end = 10_000
    chromium, expect = browser
    page, other = chromium.new_page(), chromium.new_page()
    for tab, question in ((page, "Count."), (other, "Me, too.")):
        tab.goto(f"http://127.0.0.1:{running.port}/")
        tab.fill("#prompt", question)
        tab.press("#prompt", "Enter")
        if tab is page:
            expect(page.locator(".said.model")).to_contain_text("0 1 2")
    expect(other.locator("#chat .error")).to_contain_text("another answer is being made")
    expect(other.locator("#prompt")).to_have_value("Me, too.")
    expect(other.locator("#stop")).to_be_disabled()
    page.click("#stop")
    expect(page.locator(".said.model")).to_contain_text("(stopped)")
    assert page.evaluate("turns[0][0] === 'Count.' && turns[0][1].startsWith('0 1 2')")
