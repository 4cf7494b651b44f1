"""Files that a later start finds and writes again: a full disk takes nothing of them, and what a later
version wrote into them stays there and is no reason to work again."""

import ast
import asyncio
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from megatron_eagle.checkpoint.folder import iteration_folder, partial_folder, publish_folder
from megatron_eagle.data.media.transcode import TranscodeSettings
from megatron_eagle.data.packing.index import read_packs, write_packs
from megatron_eagle.data.preparation import transcode as transcode_module
from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.processor import SampleProcessor
from megatron_eagle.data.sample import VideoSource
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.data.store.writer import StoreWriter
from megatron_eagle.eagle_video import client as client_module
from megatron_eagle.eagle_video.client import Client
from megatron_eagle.eagle_video.features import FeatureSettings
from megatron_eagle.eagle_video.selection import SelectionSettings, select
from megatron_eagle.eagle_video.transport import Endpoint, Reply
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks import read_benchmark
from megatron_eagle.evaluation.runner import run_benchmark, tabulate, write_scores
from megatron_eagle.inference.batch import answer_file
from megatron_eagle.inference.generate import Sampling
from megatron_eagle.training.monitoring.heartbeat import Heartbeat
from megatron_eagle.training.monitoring.metrics import StepMetrics
from megatron_eagle.training.monitoring.report import write_run_report
from megatron_eagle.training.monitoring.run_log import LoggingConfig, RunLog, WandbConfig
from tests.data.helpers import contents, conversation, make_tokenizer, make_video, write_jsonl
from tests.data.killed import settings as preprocess_settings
from tests.full_disk import full_disk
from tests.paths import REPO
from tests.training.conftest import wandb  # noqa: F401


@dataclass
class Kept:
    """What a first start left in a folder, and how to start again there.

    `again` starts again and returns what it did of what was done already.
    """

    again: Callable[[], object]
    refuses: bool = True  # a full disk ends it; otherwise it goes on
    later: Iterable[Path] = ()  # in which a later version may have added a field to every record,
    carried: Path | None = None  # which is found afterwards in the same files, or in this one
    heads: bool = False  # their first line is no record
    ignored: tuple[str, ...] = ()  # files that hold nothing of what is done


def step(iteration: int) -> StepMetrics:
    return StepMetrics(iteration, 2.0, 1.0, 0.1, 8, 1.0, 0.1)


def training_logs(folder: Path) -> Kept:
    config = LoggingConfig(progress=False, wandb=WandbConfig("eagle", mode="offline"))

    def start(iteration: int, *records: StepMetrics) -> None:
        with RunLog(config, folder, active=True, iteration=iteration, last_iteration=9) as log:
            for record in records:
                log.step(record)
                log.event(record.iteration, "straggler", "rank 1 is slow", rank=1)

    start(0, step(1), step(2))
    return Kept(lambda: start(2), later=(folder / "metrics.jsonl", folder / "events.jsonl"))


def heartbeats(folder: Path) -> Kept:
    def hang() -> None:
        with Heartbeat(folder, 0, seconds=0.01, hang_seconds=0.04, abort=False) as heart:
            heart.phase(3, "data")
            time.sleep(0.4)  # several times what counts as a hang

    for _ in range(50):  # on a busy machine the thread may come too late
        if not (folder / "hang.txt").exists():
            hang()
    assert "in iteration 3, data" in (folder / "hang.txt").read_text()
    alive = ("rank_00000.json", "rank_00000.stack")
    return Kept(hang, refuses=False, ignored=alive)


def report(folder: Path) -> Kept:
    (folder / "metrics.jsonl").write_text(json.dumps(asdict(step(1))) + "\n")
    write_run_report(folder)
    return Kept(lambda: write_run_report(folder) and None, later=(folder / "metrics.jsonl",))


def latest_checkpoint(folder: Path) -> Kept:
    def publish(iteration: int) -> None:
        partial_folder(folder, iteration).mkdir(exist_ok=True)
        publish_folder(folder, iteration)

    publish(1)
    (iteration_folder(folder, 1) / "state.json").write_text("{}")
    partial_folder(folder, 2).mkdir()
    return Kept(lambda: publish(2))


def answers_to_requests(folder: Path) -> Kept:
    """OUT.partial of a killed batch."""
    write_jsonl(folder / "in.jsonl", [{"prompt": name} for name in "abc"])
    asked: list[str] = []

    class Model:
        def answer(self, request, sampling, on_text=None):
            if len(asked) == 2 and "c" not in asked:
                asked.append("c")
                raise KeyboardInterrupt
            asked.append(request.prompt)
            return "answer"

    def run() -> list[str]:
        asked_before = list(asked)
        answer_file(Model(), folder / "in.jsonl", folder / "out.jsonl", Sampling(), "m")
        return [name for name in asked[len(asked_before) :] if name in "ab"]

    with pytest.raises(KeyboardInterrupt):
        run()
    (folder / "out.jsonl").write_text("of an earlier batch\n")
    return Kept(run, later=[folder / "out.jsonl.partial"], carried=folder / "out.jsonl", heads=True)


def scores(folder: Path) -> Kept:
    lines = [{"id": f"q{i}", "question": "?", "answer": "x", "metric": "exact"} for i in range(3)]
    questions, problems = read_benchmark(write_jsonl(folder / "b.jsonl", [*lines, "{"]))
    asked: list[str] = []
    model = SimpleNamespace(answer=lambda request, sampling: asked.append(request.prompt) or "x")

    def run() -> int:
        before = len(asked)
        scored = run_benchmark(lambda: model, questions, problems, folder, Sampling(), {"model": "m"})
        write_scores(folder, {}, tabulate(scored), None)
        return len(asked) - before

    run()
    return Kept(run, later=[folder / "answers.jsonl"], heads=True)


def small_copies(folder: Path) -> Kept:
    """Of a transcoded archive: the copies, their log, what failed, annotations and recipe."""
    make_video(folder / "a.mp4", 8)
    (folder / "broken.mp4").write_bytes(b"no video")
    lines = [conversation("<video>", "A.", video=f"{name}.mp4") for name in ("a", "broken")]
    write_jsonl(folder / "data.jsonl", lines)
    (folder / "recipe.json").write_text('{"d": {"annotation": "data.jsonl"}}')

    def run() -> int:
        chosen = TranscodeSettings(size=32, gop=4)
        return transcode_module.transcode(folder / "recipe.json", folder / "out", chosen, workers=1).n_new

    run()
    return Kept(run, later=(folder / "out" / "transcoded.jsonl",))


def interrupted_store(folder: Path) -> Kept:
    """A journal, and the token files of a store that is not finished."""
    lines = ["{broken" if k % 3 == 2 else conversation("Hi", "Ho " * (k + 1)) for k in range(12)]
    recipe, output = store_recipe(folder, lines), folder / "store"
    worked: list[int] = []
    process, add = SampleProcessor.process, StoreWriter.add

    def start() -> list[int]:
        worked.clear()
        count = lambda self, task: (worked.append(task.line), process(self, task))[1]  # noqa: E731
        with patch.object(SampleProcessor, "process", count):
            preprocess(recipe, output, store_settings(folder), Execution(workers=1, shard=8))
        return [line for line in worked if line <= 8]

    def killing(self, *arguments):
        if worked[-1] > 10:
            raise KeyboardInterrupt
        add(self, *arguments)

    with patch.object(StoreWriter, "add", killing), pytest.raises(KeyboardInterrupt):
        start()
    entries = [folder / ".store.journal" / f"{i:08d}" / "entry.json" for i in range(2)]
    assert all(b"dropped" in entry.read_bytes() for entry in entries)
    # The journal knows how much of the token files counts.
    return Kept(start, later=entries, ignored=("tokens.bin", "answers.bin"))


def finished_store(folder: Path) -> Kept:
    recipe, output = store_recipe(folder, [conversation("Hi", "Ho")]), folder / "store"

    def start(fresh: bool = False) -> int:
        before = (output / "manifest.json").stat().st_ino if output.exists() else 0
        preprocess(recipe, output, store_settings(folder), Execution(workers=1, fresh=fresh))
        return before not in (0, (output / "manifest.json").stat().st_ino)

    start()
    return Kept(start, refuses=False, later=(output / "manifest.json",))


def packs(folder: Path) -> Kept:
    recipe, output = store_recipe(folder, [conversation("Hi", "Ho")]), folder / "store"
    preprocess(recipe, output, store_settings(folder), Execution(workers=1))
    write_packs(output, 300, seed=0)

    def again() -> None:
        write_packs(output, 300, seed=1)
        assert len(read_packs(SampleStore(output, 300))) == 1

    return Kept(again, later=(output / "manifest.json",))


def store_recipe(folder: Path, lines: list) -> Path:
    make_tokenizer(folder / "tokenizer")
    write_jsonl(folder / "data.jsonl", lines)
    (folder / "recipe.json").write_text('{"d": {"annotation": "data.jsonl"}}')
    return folder / "recipe.json"


def store_settings(folder: Path):
    return preprocess_settings(str(folder / "tokenizer"))


def paid_answers(folder: Path) -> Kept:
    """The cache of a client that pays for each question once."""
    paid: list[str] = []

    def post(endpoint, request) -> Reply:
        paid.append(request["messages"][0]["content"])
        return Reply('{"n": 7}', False, 10, 1)

    async def ask(questions: Iterable[str]) -> None:
        with patch.object(client_module, "post", post), Client(ENDPOINT, folder / "cache") as client:
            for question in questions:
                await client.ask(question, {"type": "object"})

    def again() -> list[str]:
        paid.clear()
        asyncio.run(ask(("one", "two")))
        return [question for question in paid if question == "one"]

    asyncio.run(ask(["one"]))
    return Kept(again, later=list((folder / "cache").rglob("*.json")))


ENDPOINT = Endpoint("http://127.0.0.1:9/v1", "tiny")


class Encoder:
    """Mean colours in place of a picture model."""

    dim, device = 3, "cpu"
    encoded = 0

    def fingerprint(self) -> str:
        return "means"

    def prepare(self, picture: np.ndarray) -> torch.Tensor:
        self.encoded += 1
        return torch.from_numpy(picture).float().mean(dim=(0, 1))

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures


def selected_clips(folder: Path) -> Kept:
    """Features, searches and lists of a selection; its last step again, with one more video to encode."""
    videos = [VideoSource(str(make_video(folder / f"{name}.mp4", 8))) for name in "abc"]
    encoder = Encoder()

    def run(n: int) -> int:
        before = encoder.encoded
        select(
            videos[:n],
            [videos[0]],
            folder,
            encoder,
            SelectionSettings(clips=FeatureSettings(videos_per_shard=1)),
        )
        return encoder.encoded - before - (n == 2)

    run(1)
    return Kept(lambda: run(2), later=list(folder.rglob("shard-*.json")))


CASES = [
    training_logs,
    heartbeats,
    report,
    latest_checkpoint,
    answers_to_requests,
    scores,
    small_copies,
    interrupted_store,
    finished_store,
    packs,
    paid_answers,
    selected_clips,
]

# Functions that write a file in its place, and why none of them can lose what was there.
IN_PLACE = {
    "between two processes, in a folder that ends with them": {
        "rehearsal/server._run",
        "rehearsal/session.run_jobs",
    },
    "into a folder that ends with the process": {
        "certify/made_samples._clip",
        "certify/made_samples.make_store",
    },
    "into a folder that gets its name when it is complete": {
        "config.save_yaml",
        "convert/hf_metadata.write_hf_metadata",
        "convert/checkpoint_files.write_checkpoint",
        "convert/export_files._write_json",
        "convert/export_files._write_processor_settings",
        "convert/lora.export_adapter",
        "convert/model_card.write_model_card",
        "convert/plugin_files.write_plugin",
        "convert/shards.write_shards",
        "convert/to_hf.export_hf",
        "data/store/token_file.__init__",
        "data/store/token_file.write_token_index",
        "data/preparation/journal.__init__",
        "data/preparation/journal.commit",
        "checkpoint/files._hashed",
        "checkpoint/index.write_checkpoint_index",
        "checkpoint/hf_folder.add_frames",
        "checkpoint/hf_folder.add_tiling",
        "checkpoint/saving.complete_folder",
        "checkpoint/manifest.write_manifest",
    },
    "beside, until it is complete": {
        "files.write_whole",
        "files.write_lines",
        "data/preparation/transcode._write_annotations",
        "data/media/transcode._encode",
        "data/media/archive_unpack.unpacked_archive",
        "evaluation/published/held._file",
        "data/media/remote/cache._claim",
    },
    "at its end": {
        "files.__init__",
        "files.append_line",
        "training/monitoring/heartbeat._report",
        "training/resilience/outcome.note_outcome",
        "data/preparation/journal.lock_file",
        "data/media/remote/cache.fetching",
    },
    "nothing is there yet": {
        "inference/demo.receive",
        "data/media/remux._mux",
        "preflight/folders.write_own",
    },
    "what one command prints": {
        "evaluation/bridge.write_bridge",
        "commands/compare.main",
        "commands/plan._write",
        "commands/preview.show",
    },
}


FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


def test_no_other_file_is_written_in_its_place():
    """A new one is written with `files`, or has its reason here."""
    found = set()
    for file in sorted((REPO / "megatron_eagle").rglob("*.py")):
        module = file.relative_to(REPO / "megatron_eagle").with_suffix("").as_posix()
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, FUNCTIONS) and any(map(writes, ast.walk(function))):
                found.add(f"{module}.{function.name}")
    known = set().union(*IN_PLACE.values())
    assert found - known == set(), "use files.write_whole, or add the reason above"
    assert known - found == set()


def writes(node: ast.AST) -> bool:
    """Whether this is a call of `write_text`, `write_bytes`, or `open` for more than reading."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    texts = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
    mode = next(
        (text for text in texts if isinstance(text, str) and text and set(text) <= set("rwxab+t")), "r"
    )
    return name in ("write_text", "write_bytes") or (name == "open" and mode.strip("bt") != "r")


@pytest.fixture(params=CASES, ids=lambda case: case.__name__)
def kept(request, tmp_path, wandb) -> Kept:  # noqa: F811
    return request.param(tmp_path)


def test_a_full_disk_takes_nothing(kept, tmp_path):
    before = contents(tmp_path)
    with full_disk():
        if kept.refuses:
            with pytest.raises((UserError, OSError), match="File too large") as refused:
                kept.again()
            assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)
        else:
            kept.again()
    after = contents(tmp_path)
    lost = {name for name in before if after.get(name) != before[name]}
    assert not {name for name in lost if Path(name).name not in kept.ignored}
    assert not kept.again(), "what was done is done again"


def test_what_a_later_version_wrote_stays(kept, tmp_path):
    for file in kept.later:
        records = read_json(file)
        for record in records[kept.heads :]:
            for one in (record, *record.get("dropped", [])):
                one["later"] = {"field": 1}
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert not kept.again(), "what was done is done again"
    for file in [kept.carried] if kept.carried else kept.later:
        if file.exists():
            found = ["later" in record for record in read_json(file)]
            assert sum(found) >= 1 and all(found[kept.heads and kept.carried is None : 1])


def read_json(file: Path) -> list[dict]:
    text = file.read_text()
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.splitlines()]
