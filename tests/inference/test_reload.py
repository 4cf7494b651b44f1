"""New weights in a server that runs: who may load them, and that no answer is of two; vLLM itself is asked in
tests/serving."""

import asyncio
import json
import shutil
import threading
from types import SimpleNamespace

import pytest

from megatron_eagle.checkpoint import TRACKER, checkpoint_folder
from megatron_eagle.convert.follow import follow
from megatron_eagle.convert.to_hf import RECORD
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.vllm_plugin.reload import SECRET, WEIGHTS_PATH, Reloading


class Engine:
    """Notes what it is asked, and whether somebody was answered meanwhile."""

    def __init__(self, answering, fails=""):
        self.calls, self.answering, self.fails = [], answering, fails

    def __getattr__(self, name):
        async def call(*arguments, **settings):
            await asyncio.sleep(0)
            assert not self.answering
            self.calls.append((name, *arguments, *settings.values()))
            if arguments[:1] == (self.fails,):
                raise RuntimeError("no such tensor\nat all")

        return call


class Setup:
    """A middleware around an application whose answers end when `finish` is set."""

    def __init__(self, folder, fails=""):
        self.answering, self.order = set(), []
        self.engine, self.finish = Engine(self.answering, fails), asyncio.Event()
        config = SimpleNamespace(model_config=SimpleNamespace(model=str(folder)))
        self.app = SimpleNamespace(state=SimpleNamespace(vllm_config=config, engine_client=self.engine))
        self.middleware = Reloading(self.application)

    async def application(self, scope, receive, send):
        if scope["method"] == "POST":
            self.answering.add(scope["number"])
            await self.finish.wait()
            self.answering.remove(scope["number"])
        self.order.append(scope["number"])

    async def ask(self, method, path, secret="s", client="127.0.0.1", number=0):
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "app": self.app, "number": number}
        scope |= {"client": (client, 5), "server": ("10.0.0.5", 8000)}
        scope |= {"headers": [(b"authorization", f"Bearer {secret}".encode())]}
        await self.middleware(scope, None, send)
        return (sent[0]["status"], json.loads(sent[1]["body"])) if sent else None


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/invocations", "/inference/v1/generate", "/pooling"]
)
def test_an_answer_is_of_one_set_of_weights(exported, monkeypatch, path):
    """Those inside are waited for, those who come wait, and the caches are emptied in between."""
    monkeypatch.setenv(SECRET, "s")

    async def run():
        setup = Setup(exported)
        early = asyncio.create_task(setup.ask("POST", path, number=1))
        await asyncio.sleep(0.01)
        load = asyncio.create_task(setup.ask("POST", WEIGHTS_PATH))
        await asyncio.sleep(0.01)
        late = asyncio.create_task(setup.ask("POST", path, number=2))
        await asyncio.sleep(0.01)
        assert setup.answering == {1} and not setup.engine.calls
        await setup.ask("GET", "/health", number=3)  # is not kept waiting
        setup.finish.set()
        assert (await asyncio.gather(early, load, late))[1] == (200, {"iteration": 0, "loads": 1})
        assert setup.order == [3, 1, 2]
        return setup.engine.calls

    calls = asyncio.run(run())
    names = [call[0] for call in calls]
    assert names[:2] == ["pause_generation", "collective_rpc"] and names[-1] == "resume_generation"
    assert {"reset_encoder_cache", "reset_mm_cache", "reset_prefix_cache"} == set(names[2:-1])
    assert calls[1] == ("collective_rpc", "load_export", (str(exported),))


@pytest.mark.parametrize(
    ("secret", "client", "environment", "status"),
    [
        ("s", "127.0.0.1", "s", 200),
        ("s", "::1", "s", 200),
        ("s", "10.0.0.5", "s", 200),  # the server's own address
        ("other", "127.0.0.1", "s", 403),
        ("s", "10.0.0.6", "s", 403),
        ("", "127.0.0.1", "", 403),  # a server without --follow
    ],
)
def test_only_this_machine_with_the_secret_loads(exported, monkeypatch, secret, client, environment, status):
    monkeypatch.setenv(SECRET, environment)
    setup = Setup(exported)
    assert asyncio.run(setup.ask("POST", WEIGHTS_PATH, secret, client))[0] == status
    assert bool(setup.engine.calls) == (status == 200)


def test_a_model_of_two_halves_answers_nobody(exported, monkeypatch):
    monkeypatch.setenv(SECRET, "s")

    async def run():
        setup = Setup(exported, fails="load_export")
        setup.finish.set()
        load = await setup.ask("POST", WEIGHTS_PATH)
        return load, await setup.ask("POST", "/v1/chat/completions"), setup.engine.calls[-1][0]

    load, answer, last = asyncio.run(run())
    assert load[0] == 500 and answer[0] == 503 and last == "collective_rpc"
    assert load[1]["error"]["message"].endswith(": no such tensor; start the server again")


def newer(checkpoint, iteration, of):
    """As if the run had saved another, like that `of` an earlier iteration."""
    shutil.copytree(checkpoint_folder(checkpoint, of), checkpoint / f"iter_{iteration:07d}")
    (checkpoint / TRACKER).write_text(f"{iteration}\n")


def test_each_checkpoint_is_exported_once(checkpoint, tmp_path):
    copy, hf, lines = tmp_path / "c", tmp_path / "hf", []
    copy.mkdir()
    found = follow(copy, hf, None, every=0.01, say=lines.append)
    (shutil.copytree(checkpoint, copy, dirs_exist_ok=True) / TRACKER).rename(copy / "later")
    threading.Timer(0.1, (copy / "later").rename, (copy / TRACKER,)).start()
    assert next(found) == 0
    newer(copy, 7, 0)
    assert next(found) == 7 and json.loads((hf / RECORD).read_text())["iteration"] == 7
    damaged = shutil.copytree(copy / "iter_0000007", copy / "iter_0000008")
    (damaged / "run.yaml").unlink()  # says so, and goes on with the one after it
    (copy / TRACKER).write_text("8")
    threading.Timer(0.2, newer, (copy, 9, 7)).start()
    assert next(found) == 9
    first, *rest = lines
    assert first == f"{copy}: waiting for the first checkpoint"
    assert [line.split(" exported")[0] for line in rest] == [
        f"{hf}: iteration 0",
        f"{hf}: iteration 7",
        rest[2],
        f"{hf}: iteration 9",
    ]
    assert rest[2].startswith("warning: iteration 8: ") and "run.yaml is missing" in rest[2]


def test_bad_targets_are_refused(checkpoint, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="exists and is no earlier export"):
        next(follow(checkpoint, tmp_path / "other", None, every=0.01, say=print))
