"""What vLLM needs of an export, recorded from vLLM 0.33, the parts of the plugin that do without it, and the
client for servers. No vLLM is run: tests/serving does."""

import asyncio
import base64
import http.server
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode

import pytest
from PIL import Image
from transformers import AutoConfig, AutoTokenizer

from megatron_eagle.errors import UserError
from megatron_eagle.hf_model import vllm_plugin
from megatron_eagle.hf_model.vllm_plugin.certificate import file_digests
from megatron_eagle.hf_model.vllm_plugin.export import NAME
from megatron_eagle.hf_model.vllm_plugin.seen import SEEN, SeenMedia
from megatron_eagle.hf_model.vllm_plugin.settings import ExportSettings
from megatron_eagle.hf_model.vllm_plugin.video_url import split_url
from megatron_eagle.inference.generate import ExportedModel, Request, Sampling
from megatron_eagle.inference.server_client import ServedModel
from tests.convert.hf_folder import read_weights
from tests.convert.media import write_picture, write_video
from tests.data.helpers import make_pdf
from tests.paths import REPO

# What vllm/model_executor/models/{eagle2_5_vl,siglip,qwen2}.py read of a configuration.
ATTRIBUTES = {
    "": (
        "architectures",
        "force_image_size",
        "min_dynamic_patch",
        "max_dynamic_patch",
        "dynamic_image_size",
        "use_thumbnail",
        "downsample_ratio",
        "select_layer",
    ),
    "vision_config": (
        "image_size",
        "patch_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
        "hidden_act",
        "layer_norm_eps",
        "attention_dropout",
    ),
    "text_config": (
        "architectures",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
    ),
}
# Weights that its loader takes; it has no mapping of names, and leaves out the pooling head.
VISION = r"vision_model\.vision_model\."
NAMES = re.compile(
    rf"{VISION}embeddings\.(patch_embedding\.(weight|bias)|position_embedding\.weight)"
    rf"|{VISION}encoder\.layers\.\d+\.(layer_norm[12]|self_attn\.([qkv]|out)_proj|mlp\.fc[12])\.(weight|bias)"
    rf"|{VISION}post_layernorm\.(weight|bias)"
    rf"|{VISION}head\..+"
    r"|mlp1\.[013]\.(weight|bias)"
    r"|language_model\.(model\.(embed_tokens|norm)|lm_head)\.weight"
    r"|language_model\.model\.layers\.\d+\.self_attn\.([qkv]_proj\.(weight|bias)|o_proj\.weight)"
    r"|language_model\.model\.layers\.\d+\.(mlp\.(gate|up|down)_proj|(input|post_attention)_layernorm)\.weight"
)


def test_vllm_finds_every_attribute(exported):
    config = AutoConfig.from_pretrained(exported, trust_remote_code=True)
    written = json.loads((exported / "config.json").read_text())
    for part, names in ATTRIBUTES.items():
        value, raw = (getattr(config, part), written[part]) if part else (config, written)
        for name in names:
            assert getattr(value, name) is not None and raw[name] is not None, (part, name)
    assert config.architectures == ["Eagle2_5_VLForConditionalGeneration"]
    assert config.text_config.architectures == ["Qwen2ForCausalLM"]
    assert written["auto_map"]["AutoConfig"].split(".")[0] + ".py" in os.listdir(exported)


def test_vllm_knows_every_weight_and_misses_none(exported):
    names = read_weights(exported).keys()
    assert not [name for name in names if not NAMES.fullmatch(name)]
    # Two layers of each encoder: 16 weights of a vision layer, 12 of a language layer.
    assert len([name for name in names if ".head." not in name]) == 3 + 2 * 16 + 2 + 6 + 3 + 2 * 12


def test_vllms_placeholders_are_single_tokens(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    for token in ("<img>", "</img>", "<IMG_CONTEXT>"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1


def test_a_turn_as_text_keeps_vllms_placeholder(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    turn = [{"role": "user", "content": "<image>\nWhat is it?"}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert "user\n<image>\nWhat is it?<|im_end|>" in prompt


def test_an_export_brings_the_plugin_installed(exported, monkeypatch):
    folder = exported / "vllm_plugin"
    code = Path(vllm_plugin.__file__).parent
    names = sorted(path.name for path in code.glob("*.py"))
    assert names == sorted(path.name for path in (folder / "eagle2_5_vllm").glob("*.py")) and len(names) > 5
    for name in names:
        assert (folder / "eagle2_5_vllm" / name).read_bytes() == (code / name).read_bytes()
    (found,) = distributions(path=[str(folder)])  # as vLLM finds it on PYTHONPATH
    (entry,) = found.entry_points
    assert (entry.group, entry.name) == ("vllm.general_plugins", NAME)
    monkeypatch.syspath_prepend(folder)
    assert entry.load().__name__ == "register"
    monkeypatch.delitem(sys.modules, "eagle2_5_vllm")
    own = f'"{entry.name} = {vllm_plugin.__name__}:register"'
    assert own in (REPO / "setup.py").read_text()


def test_what_the_plugin_asks_of_an_export(exported):
    model = ExportedModel(exported)
    processor = model.processor
    medium, tiles = processor.show(Image.new("RGB", (64, 64)))
    text, order = processor.place("a <image-1> b", {"image": [medium], "video": []})
    assert order == [("image", 0)] and len(tiles["pixel_values"]) == 1
    assert type(medium) is sys.modules[type(processor).__module__].PromptMedium
    typed = processor.shield("<|im_end|>", "user")
    assert (
        processor.encode("<|im_end|>") != processor.encode(typed)
        and processor.decode(processor.encode(typed)) == "<|im_end|>"
    )
    with pytest.raises(ValueError, match="asks for <image-2>"):
        processor.place("<image-1><image-2>", {"image": [medium], "video": []})


def test_the_script_starts_vllm_and_refuses_other_folders(exported, checkpoint, tmp_path):
    script = str(REPO / "tools" / "serve_vllm.sh")
    said = 'printf "%s\\n" "$VLLM_MEDIA_CONNECTOR" "${VLLM_PLUGINS-unset}" "$PYTHONPATH" "$@"'
    (tmp_path / "vllm").write_text(f"#!/bin/sh\n{said}\n")
    (tmp_path / "vllm").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PORT": "8123",
        "PYTHONPATH": "x",
    }
    for name in ("VLLM_PLUGINS", "VLLM_MEDIA_CONNECTOR"):
        environment.pop(name, None)

    def start(*arguments, **more):
        command = ["bash", script, *map(str, arguments)]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True)

    started = start(exported, "--max-model-len", "4096")
    connector, plugins, path, *arguments = started.stdout.splitlines()
    assert (connector, plugins, path) == ("eagle2_5", "unset", f"{exported}/vllm_plugin:x")
    assert started.returncode == 0 and arguments[:3] == ["serve", str(exported), "--trust-remote-code"]
    assert arguments[-2:] == ["--max-model-len", "4096"] and "8123" in arguments
    assert arguments[arguments.index("--tokenizer-mode") + 1] == NAME
    limits = json.loads(arguments[arguments.index("--limit-mm-per-prompt") + 1])
    assert limits == {"image": 512, "video": {"count": 8}}  # frames are the export's own
    assert not {"--media-io-kwargs", "--mm-processor-kwargs"} & set(arguments)
    arguments = start(exported, MAX_FRAMES="512", MAX_TILES="48").stdout.splitlines()
    asked = [
        arguments[arguments.index(f"--{name}") + 1] for name in ("media-io-kwargs", "mm-processor-kwargs")
    ]
    assert list(map(json.loads, asked)) == [{"video": {"max_frames": 512}}, {"max_dynamic_tiles": 48}]
    assert '"num_frames": 512' in arguments[arguments.index("--limit-mm-per-prompt") + 1]
    for stock, value, message in (((), "many", "MAX_FRAMES=many: expected"), (("--stock",), "9", "a stock")):
        refused = start(exported, *stock, MAX_FRAMES=value)
        assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1
    assert start(exported, VLLM_PLUGINS="mine").stdout.splitlines()[1] == "mine,eagle2_5"
    certified = shutil.copytree(exported, tmp_path / "certified")
    found = {"green": True, "date": "today", "files": file_digests(certified)}
    (certified / "certificate.json").write_text(json.dumps(found))
    assert start(certified).stderr == f"{certified}: certificate.json of today is green\n"
    (certified / "config.json").write_text((certified / "config.json").read_text() + " ")
    assert "of other files (config.json changed since)" in start(certified).stderr
    assert start(exported).stderr == start(certified, "--stock").stderr == ""

    connector, plugins, path, *arguments = start(exported, "--stock", "--port", "1").stdout.splitlines()
    assert (connector, plugins, path) == ("", "", "x")
    assert arguments[-2:] == ["--port", "1"] and not {"--stock", "--tokenizer-mode"} & set(arguments)
    assert json.loads(arguments[arguments.index("--limit-mm-per-prompt") + 1]) == {"image": 512}

    earlier = tmp_path / "earlier"
    earlier.mkdir()
    for file in exported.iterdir():
        if file.name != "vllm_plugin":
            (earlier / file.name).symlink_to(file)
    assert start(earlier, "--stock").returncode == 0
    for wrong, message in (((), "usage"), ((checkpoint,), "no config.json"), ((earlier,), "no vllm_plugin")):
        refused = start(*wrong)
        assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1


def ask_middleware(folder, path, **asked):
    """Status, body and what reached the application behind, of a GET."""
    sent, behind = [], []

    async def send(message):
        sent.append(message)

    async def application(scope, receive, send):
        behind.append(scope["path"])

    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(folder),
            dtype="torch.float32",
            multimodal_config=SimpleNamespace(mm_processor_kwargs=asked or None),
        )
    )
    app = SimpleNamespace(state=SimpleNamespace(vllm_config=config))
    asyncio.run(ExportSettings(application)({"type": "http", "path": path, "app": app}, None, send))
    return sent[0]["status"] if sent else None, b"".join(m.get("body", b"") for m in sent), behind


def test_the_middleware_tells_how_pictures_are_cut(exported):
    status, body, behind = ask_middleware(exported, "/v1/export")
    settings = json.loads((exported / "preprocessor_config.json").read_text())
    expected = {"tile_size": 64, "max_tiles": settings["max_dynamic_tiles"], "tiling": "iap"}
    expected |= {"dtype": "float32", "vllm": None}  # it is not installed here
    assert (status, json.loads(body), behind) == (200, expected, [])
    _, body, _ = ask_middleware(exported, "/v1/export", max_dynamic_tiles=48)  # as the server was started
    assert json.loads(body) == {**expected, "max_tiles": 48}
    assert ask_middleware(exported, "/v1/models") == (None, b"", ["/v1/models"])
    assert ask_middleware(exported, "/v1/exports") == (None, b"", ["/v1/exports"])
    _, body, _ = ask_middleware(exported, "/v1/export/files")
    assert json.loads(body) == file_digests(exported)


def test_the_middleware_tells_what_the_certificate_says(exported):
    def told():
        return json.loads(ask_middleware(exported, "/v1/export/certificate")[1])["certificate"]

    assert told() is None
    content = {"green": True, "date": "2026-11-29", "files": file_digests(exported)}
    path = exported / "certificate.json"
    path.write_text(json.dumps(content))
    try:
        assert told() == "certificate.json of 2026-11-29 is green"
        path.write_text(json.dumps({**content, "files": {**content["files"], "config.json": "0"}}))
        assert "of other files (config.json changed since)" in told()
    finally:
        path.unlink()


def test_the_middleware_tells_what_was_seen_once(exported):
    number = "5" * 32
    path = f"/v1/export/seen/{number}"
    assert ask_middleware(exported, path)[0] == 404
    SEEN.keep(number, [{"kind": "picture"}])
    assert json.loads(ask_middleware(exported, path)[1]) == {"media": [{"kind": "picture"}]}
    assert ask_middleware(exported, path)[0] == 404
    for wrong in (5, "5" * 31, "../" * 8):
        with pytest.raises(ValueError, match="32 hexadecimal digits"):
            SEEN.keep(wrong, [])
    kept = SeenMedia()
    for i in range(70):  # those of whom nobody asks do not add up
        kept.keep(f"{i:032x}", [])
    assert kept.take(f"{5:032x}") is None and kept.take(f"{6:032x}") == []


def test_a_video_says_in_its_url_how_it_is_sampled():
    url, settings = split_url("http://h/v.mp4?a=1#fps=2.5&video_start=1", {"max_frames": 8, "fps": 9})
    assert url == "http://h/v.mp4?a=1" and settings == {"fps": 2.5, "video_start": 1.0, "max_frames": 8}
    _, settings = split_url(
        "data:video/mp4;base64,AA==#nframes=4.0", {"fps": 9, "max_frames": 8, "video_end": 3}
    )
    assert settings == {"nframes": 4, "video_end": 3.0} and type(settings["nframes"]) is int
    assert split_url("file:///v.mp4", {"fps": None}) == ("file:///v.mp4", {})
    # A server's limit, and then what a client of vLLM asks for.
    assert split_url("file:///v.mp4", {"max_frames": 8, "num_frames": 4})[1] == {"max_frames": 4}
    said = [[0.5, 2, "a & b\u2028#c"]]
    url = f"data:video/mp4;base64,AA==#{urlencode({'subtitles': json.dumps(said), 'fps': 2})}"
    assert split_url(url)[1] == {"subtitles": said, "fps": 2.0}
    for wrong, message in (
        ("#subtitles=hello", "subtitles must be JSON"),
        ("#speed=2", "has no setting speed"),
        ("#fps=abc", "fps must be a number, not 'abc'"),
        ("#fps=inf", "fps must be a number"),
        ("#fps=", "fps must be a number"),
        ("#nframes=2.5", "nframes must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            split_url(f"http://h/v.mp4{wrong}")


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with the number of pictures and the prompt; "fail" is refused, "break" breaks off."""

    requests: list[dict]
    answers: dict[str, str] = {}  # to prompts, in place of that
    export: dict = {}  # what the plugin's middleware says

    def log_message(self, *arguments):
        pass

    def _send(self, status, value):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(value if isinstance(value, bytes) else json.dumps(value).encode())

    def do_GET(self):
        tiny = {"id": "tiny", "max_model_len": 5000}
        self._send(200, {"data": [tiny]} if self.path == "/v1/models" else self.export)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(body)
        content = [item for message in body["messages"] for item in message["content"]]
        prompt = content[-1]["text"]
        if prompt == "fail":
            self._send(400, {"error": {"message": "too long\nreally"}})
            return
        if prompt == "late":
            time.sleep(0.5)
        if prompt == "stall":  # after its first piece
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n')
            self.wfile.flush()
            time.sleep(0.5)
            return
        if prompt in self.answers:
            self._send(200, {"choices": [{"message": {"content": self.answers[prompt]}}]})
            return
        pieces = [f"{sum(c['type'] == 'image_url' for c in content)} pictures, ", prompt]
        if not body["stream"]:
            self._send(200, {"choices": [{"message": {"content": "".join(pieces)}}]})
            return
        events = [json.dumps({"choices": [{"delta": {"content": piece}}]}) for piece in pieces]
        events += [] if prompt == "break" else ["[DONE]"]
        self._send(200, b"".join(f"data: {event}\n\n".encode() for event in events))


@contextmanager
def protocol_server():
    """URL of a running `Server`, and the requests that it got."""
    handler = type("Recorded", (Server,), {"requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", handler.requests
        running.shutdown()


@pytest.fixture(scope="module")
def server():
    with protocol_server() as running:
        yield running


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    return write_picture(folder / "p.png", 60, 40), write_video(folder / "v.mp4")


def run_tool(monkeypatch, capsys, *arguments, tool="generate.py"):
    monkeypatch.setattr("sys.argv", [tool, *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(REPO / "tools" / tool), run_name="__main__")
    return exit.value.code or 0, *capsys.readouterr()


def test_pictures_and_frames_reach_the_server(server, media):
    url, requests = server
    picture, video = media
    model = ServedModel(url)
    assert model.model == "tiny" and ServedModel(f"{url}/v1", "own").model == "own"
    assert model.read_max_positions() == 5000 and ServedModel(url, "own").read_max_positions() is None
    assert ServedModel("http://127.0.0.1:9", "own").read_max_positions() is None
    request = Request("What?", (picture,), ({"video": video, "nframes": 4},))
    assert model.answer(request, Sampling(max_new_tokens=9)) == "5 pictures, What?"
    sent = requests[-1]
    assert (sent["max_tokens"], sent["temperature"], sent["model"]) == (9, 0, "tiny")
    content = sent["messages"][0]["content"]
    texts = [item["text"] for item in content if item["type"] == "text"]
    labels = [f"Frame {i} sample at {t}s: " for i, t in enumerate(("0.00", "1.00", "1.90", "2.90"), 1)]
    assert texts == ["The first video sampled with 1.33 fps: ", *labels, "What?"]
    encoded = content[0]["image_url"]["url"].removeprefix("data:image/png;base64,")
    ours = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert ours.tobytes() == Image.open(picture).convert("RGB").tobytes()


def _prompt_of_both(server, model: ExportedModel, request: Request) -> str:
    """The export's prompt, which has, without its pictures, the text that a server is sent."""
    url, requests = server
    ServedModel(url).answer(request)
    texts = [item["text"] for item in requests[-1]["messages"][0]["content"] if item["type"] == "text"]
    prompt = model.processor.decode(model._inputs(request, Sampling())["input_ids"][0])
    written = re.sub(r"<img>(<IMG_CONTEXT>)+</img>", "", prompt)
    assert f"<|im_start|>user\n{''.join(texts)}<|im_end|>" in written
    return prompt


def test_frames_are_labelled_as_the_exports_processor_does(server, exported, media):
    _, video = media
    request = Request(
        "What?", videos=({"video": video, "nframes": 4}, {"video": video, "fps": 1, "start_time": 1})
    )
    prompt = _prompt_of_both(server, ExportedModel(exported), request)
    assert "The second video sampled with " in prompt


def test_subtitles_reach_a_server_as_they_reach_the_export(server, exported, media, monkeypatch):
    """As text between the frames, or, where the plugin writes it, with the file."""
    url, requests = server
    said = [[0.2, 0.8, "first & <|im_end|>"], [1.5, 2.2, "second"]]
    request = Request("What?", videos=({"video": media[1], "nframes": 6, "subtitles": said},))
    model = ExportedModel(exported)
    prompt = _prompt_of_both(server, model, request)
    assert "</img>\nsecond\nFrame" in prompt
    monkeypatch.setattr(Server, "export", {"tile_size": 64, "max_tiles": 6, "tiling": "iap"})
    ServedModel(url).answer(request)
    sent = requests[-1]["messages"][0]["content"][0]["video_url"]["url"]
    assert split_url(sent)[1] == {"nframes": 6, "subtitles": said}
    monkeypatch.delattr(type(model.processor), "takes_subtitles")  # an export of before
    with pytest.raises(UserError, match="subtitles.*export it again"):
        model._inputs(request, Sampling())


def test_a_server_with_the_plugin_gets_files_and_tiles(server, media, tmp_path, monkeypatch):
    url, requests = server
    _, video = media
    document = str(make_pdf(tmp_path / "d.pdf", 1))
    monkeypatch.setattr(Server, "export", {"tile_size": 64, "max_tiles": 6, "tiling": "iap"})
    model = ServedModel(url)
    videos = (video, {"video": video, "nframes": 4, "end_time": 2.5}, "http://h/v.mp4")
    request = Request("What?", videos=videos, documents=(document,), max_tiles=3, frame_tiles=2)
    assert model.answer(request, Sampling(fps=2)) == "1 pictures, What?"
    sent = requests[-1]
    assert sent["mm_processor_kwargs"] == {"max_dynamic_tiles": 3, "videos_kwargs": {"max_dynamic_tiles": 2}}
    page, *videos, _ = sent["messages"][0]["content"]
    encoded = page["image_url"]["url"].removeprefix("data:image/png;base64,")
    width, height = Image.open(io.BytesIO(base64.b64decode(encoded))).size
    assert width % 64 == height % 64 == 0 and width * height <= 3 * 64**2
    urls = [item["video_url"]["url"] for item in videos]
    assert [split_url(url)[1] for url in urls] == [{"fps": 2}, {"nframes": 4, "video_end": 2.5}, {"fps": 2}]
    data = base64.b64decode(split_url(urls[0])[0].removeprefix("data:video/mp4;base64,"))
    assert data == Path(video).read_bytes() and urls[2] == "http://h/v.mp4#fps=2"
    assert "mm_processor_kwargs" not in model.body(Request("What?"))
    with pytest.raises(UserError, match="video not found: nowhere.mp4"):
        model.answer(Request("What?", videos=("nowhere.mp4",)))
    monkeypatch.setattr(Server, "export", {"detail": "other"})
    with pytest.raises(UserError, match="the server's own setting"):
        ServedModel(url).answer(Request("What?", frame_tiles=2))


def test_pages_and_earlier_turns_reach_the_server(server, tmp_path):
    url, requests = server
    document = str(make_pdf(tmp_path / "d.pdf", 3))
    request = Request("Why?", documents=(document,), turns=(("What?", "A cat."),))
    assert ServedModel(url).answer(request) == "3 pictures, Why?"
    sent = requests[-1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    assert [item["type"] for item in sent[0]["content"]] == 3 * ["image_url"] + ["text"]


def test_the_tool_streams_and_reads_files_of_requests(server, media, tmp_path, monkeypatch, capsys):
    url, _ = server
    status, out, _ = run_tool(monkeypatch, capsys, "--endpoint", url, "--image", media[0], "--prompt", "A?")
    assert (status, out) == (0, "1 pictures, A?\n")
    (tmp_path / "q.jsonl").write_text('{"prompt": "B?"}\n')
    batch = ("--jsonl", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl")
    assert run_tool(monkeypatch, capsys, "--endpoint", url, *batch)[0] == 0
    assert json.loads((tmp_path / "a.jsonl").read_text())["answer"] == "0 pictures, B?"


def test_what_a_server_may_do_wrong_is_one_line(server, media):
    url, _ = server
    model = ServedModel(url)
    for request, stream, message in [
        (Request("fail"), False, "the server says 400: too long$"),
        (Request("break"), True, "broke off"),
        (Request("a", ("nowhere.png",)), False, "image not found: nowhere.png"),
        (Request("a", (), ("nowhere.mp4",)), False, "video not found: nowhere.mp4"),
        (Request("a", max_tiles=2), False, "the server's own setting"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            model.answer(request, on_text=(lambda piece: None) if stream else None)
        assert "\n" not in str(error.value)
    for wrong, message in [
        ("127.0.0.1:8000", "expected the URL of a server"),
        ("http://127.0.0.1:9", "cannot be reached"),
        (f"{url}/other", "names no model"),
    ]:
        with pytest.raises(UserError, match=message):
            ServedModel(wrong)


def test_a_server_is_waited_for_as_long_as_it_is_long(server, monkeypatch, capsys):
    url, _ = server
    hasty = ServedModel(url, timeout=0.2)
    for prompt, stream in (("late", None), ("stall", lambda piece: None)):
        with pytest.raises(UserError, match="nothing came for 0.2 seconds; --timeout waits longer$"):
            hasty.answer(Request(prompt), on_text=stream)
    assert ServedModel(url, timeout=30).answer(Request("late")) == "0 pictures, late"
    assert ServedModel(url).timeout == 600  # it takes 5,000 tokens
    for served, seconds in ((32_768, 600), (131_072, 2400), (None, 600)):
        monkeypatch.setattr(ServedModel, "read_max_positions", lambda self, served=served: served)
        assert ServedModel(url).timeout == seconds
    for command in ("generate.py", "compare_server.py", "serve_demo.py", "evaluate.py", "convert_hf.py"):
        words = {"evaluate.py": ["run"], "convert_hf.py": ["certify"]}.get(command, [])
        status, _, error = run_tool(monkeypatch, capsys, *words, "--timeout", "-1", tool=command)
        assert status == 2 and "-1 is no positive number of seconds" in error


def test_a_checkpoint_answers_like_its_export(checkpoint, exported, media, monkeypatch, capsys):
    question = ("--image", media[0], "--prompt", "What is it?", "--max-new-tokens", 6)
    status, ours, err = run_tool(monkeypatch, capsys, "--checkpoint", checkpoint, *question)
    assert status == 0 and ours.strip(), err
    assert run_tool(monkeypatch, capsys, "--hf", exported, *question)[1] == ours


def test_one_source_of_answers(exported, checkpoint, tmp_path, monkeypatch, capsys):
    both = ("--hf", exported, "--checkpoint", checkpoint, "--prompt", "a")
    assert run_tool(monkeypatch, capsys, *both)[0] == 2
    status, _, err = run_tool(monkeypatch, capsys, "--checkpoint", tmp_path, "--prompt", "a")
    assert status == 2 and "not a checkpoint" in err and err.count("\n") == 1
    status, _, err = run_tool(monkeypatch, capsys, "--hf", exported, "--model", "m", "--prompt", "a")
    assert status == 2 and "needs --endpoint" in err


def test_an_export_and_a_server_are_compared(exported, server, media, tmp_path, monkeypatch, capsys):
    url, sent = server
    picture, video = media
    questions, output = tmp_path / "q.jsonl", tmp_path / "both.jsonl"
    records = [{"prompt": "Same?", "images": [picture]}, {"prompt": "Parted?", "videos": [video]}]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    model, sampling = ExportedModel(exported), Sampling(max_frames=4, max_new_tokens=6)
    same = model.answer(Request("Same?", (picture,)), sampling)
    other = model.answer(Request("Parted?", (), (video,)), sampling)
    monkeypatch.setattr(
        Server, "answers", {"Same?": same, "Parted?": other[:2] + "\u00a7" * (len(other) - 2)}
    )

    def compare(*options):
        source = ("--hf", exported, "--endpoint", url, "--jsonl", questions, "--output", output)
        arguments = (*source, "--max-frames", 4, "--max-new-tokens", 6, *options)
        return run_tool(monkeypatch, capsys, *arguments, tool="compare_server.py")

    status, out, err = compare()
    assert status == 1 and "1 of 2 answers are equal" in out and "  100%  " in out, err
    assert "warning: prompts of up to 5,000 tokens, which the server takes, go beyond the 4,096 that" in err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["agree"] for row in rows] == [1, 2 / len(other)]
    assert (rows[0]["export"], rows[1]["server"][:2]) == (same, other[:2])
    contents = [body["messages"][0]["content"] for body in sent[-2:]]
    assert [sum(item["type"] == "image_url" for item in content) for content in contents] == [1, 4]
    assert compare("--at-least", 0.5)[0] == 0
    status, _, err = compare("--at-least", 0)
    assert status == 2 and "--at-least 0: expected a share" in err
    questions.write_text('{"prompt": "fail"}\n')
    status, _, err = compare()
    assert status == 2 and "line 1: " in err and "too long" in err
    questions.write_text("")
    assert "has no requests" in compare()[2]
