"""What is opened when it is first needed may be needed by several threads at the same time."""

import ast
import io
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from PIL import Image

from megatron_eagle.data.media.images import load_image
from megatron_eagle.data.media.source import database_picture
from megatron_eagle.data.store.reader import SampleStore
from tests.data.helpers import conversation, make_store
from tests.paths import REPO

THREADS = 8


def at_once(calls):
    """The results of all calls, begun together."""
    barrier = Barrier(THREADS)

    def call(one):
        barrier.wait()
        return one()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(call, calls))


def test_threads_that_meet_a_new_database(tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    stream = io.BytesIO()
    Image.new("RGB", (8, 4), (255, 0, 0)).save(stream, "PNG")
    for name in ("one", "two"):
        with lmdb.open(str(tmp_path / name)) as database, database.begin(write=True) as transaction:
            for key in range(THREADS):
                transaction.put(str(key).encode(), stream.getvalue())
    original = lmdb.open

    def slowly(*arguments, **options):
        time.sleep(0.05)
        return original(*arguments, **options)

    monkeypatch.setattr(lmdb, "open", slowly)
    (tmp_path / "link").symlink_to("two")
    for names in (("one", "one"), ("two", "link")):  # a process may open a database once, under any name
        paths = [database_picture(str(tmp_path / names[k % 2]), str(k)) for k in range(THREADS)]
        pictures = at_once([lambda path=path: load_image(path) for path in paths])
        assert {picture.size for picture in pictures} == {(8, 4)}


def test_threads_that_read_a_new_store(tmp_path, tokenizer_dir):
    records = [conversation("Hi", "Ho " * (k + 1)) for k in range(40)]
    path = make_store(tmp_path, tokenizer_dir, records)
    expected = [SampleStore(path)[k].line for k in range(40)]
    for _ in range(5):
        store = SampleStore(path)
        rows = at_once([lambda s=store: [s[k].line for k in range(40)]] * THREADS)
        assert rows == [expected] * THREADS


def test_no_other_handle_is_opened_late():
    """Functions whose value is kept and that open something: each is locked, or no thread shares it."""
    known = {
        ("data/media/addresses/databases.py", "_opened"),  # under a lock
        ("eagle_video/features.py", "features"),  # a second map of the same file does no harm
        ("data/store/reader.py", "_open_batch"),  # views of a map; twice does no harm
        ("data/store/shards.py", "_open_shard"),  # the same
    }
    found = set()
    for path in (REPO / "megatron_eagle").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if "cache" not in source and "cached_property" not in source:
            continue
        kept = {
            argument.attr
            for call in ast.walk(ast.parse(source))
            if isinstance(call, ast.Call) and "lru_cache" in ast.unparse(call.func)
            for argument in call.args
            if isinstance(argument, ast.Attribute)
        }
        for function in ast.walk(ast.parse(source)):
            if not isinstance(function, ast.FunctionDef):
                continue
            cached = function.name in kept or any("cache" in ast.unparse(d) for d in function.decorator_list)
            opening = [
                ast.unparse(call.func)
                for call in ast.walk(function)
                if isinstance(call, ast.Call)
                and any(
                    word in ast.unparse(call) for word in ("open(", "memory_map", "mmap_mode", "get_batch")
                )
            ]
            if cached and opening:
                found.add((str(path.relative_to(REPO / "megatron_eagle")), function.name))
    assert found == known
