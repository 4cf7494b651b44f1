"""The cache: whole files only, never too many bytes, what is in use stays, a full disk is a line."""

import multiprocessing
import os
import random
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_eagle.data.media.remote.cache import HeldFile, MediaCache
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem
from tests.full_disk import full_disk

DATE = 1_400_000_000_000_001_000


def key(number: int) -> str:
    return f"{number:02x}{number:030x}"


def put(cache: MediaCache, number: int, size: int, piece: int = 7) -> HeldFile:
    content = bytes([number]) * size

    def write(take):
        for start in range(0, size, piece):
            take(content[start : start + piece])

    return cache.put(key(number), ".bin", size, DATE, write)


def there(cache: MediaCache, *numbers: int) -> list[int]:
    """Which of these files the cache has."""
    found = {number: cache.find(key(number), ".bin") for number in numbers}
    for held in found.values():
        if held:
            held.close()
    return [number for number, held in found.items() if held]


def bytes_in(folder: Path) -> int:
    total = 0
    for path in list(folder.rglob("*.bin*")):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_a_file_is_there_whole_with_its_date(tmp_path):
    cache = MediaCache(tmp_path, 100, patience=1)
    assert cache.find(key(1), ".bin") is None
    with put(cache, 1, 50) as held:
        assert Path(held.path).read_bytes() == b"\1" * 50
        assert os.stat(held.path).st_mtime_ns == DATE
    with MediaCache(tmp_path, 100).find(key(1), ".bin") as found:
        assert found.path == held.path


def test_what_was_not_used_for_longest_goes(tmp_path):
    cache = MediaCache(tmp_path, 100, patience=1)
    for number in (1, 2, 3):
        put(cache, number, 30).close()
    cache.find(key(1), ".bin").close()
    put(cache, 4, 30).close()
    kept = there(cache, 1, 2, 3, 4)
    assert kept == [1, 3, 4]
    put(cache, 5, 40).close()  # ten more are freed than it takes, so that not every file has to free some
    assert there(cache, 1, 3, 4, 5) == [4, 5]
    assert bytes_in(tmp_path) <= 100


def test_what_is_held_stays(tmp_path):
    cache = MediaCache(tmp_path, 100, patience=0.1)
    with put(cache, 1, 60) as held:
        with pytest.raises(Problem, match="cache too small: .* all of its 100 bytes are in use"):
            put(cache, 2, 60)
        assert Path(held.path).read_bytes() == b"\1" * 60
    put(cache, 2, 60).close()
    assert not there(cache, 1)
    with pytest.raises(Problem, match="holds 100 bytes, the medium has 101"):
        put(cache, 3, 101)
    assert there(cache, 2), "what cannot fit throws nothing away"


def test_a_reading_that_fails_leaves_nothing(tmp_path):
    cache = MediaCache(tmp_path, 100, patience=1)

    def fail(take):
        take(b"half")
        raise ConnectionResetError("cut")

    for _ in range(5):
        with pytest.raises(ConnectionResetError, match="cut"):
            cache.put(key(1), ".bin", 60, DATE, fail)
    assert bytes_in(tmp_path) == 0
    put(cache, 2, 90).close()  # nor does it count


def test_a_full_disk_is_one_line(tmp_path):
    cache = MediaCache(tmp_path, 10_000)
    put(cache, 1, 50).close()
    with full_disk(100), pytest.raises(UserError, match="the cache .*: File too large; make room"):
        put(cache, 2, 5000)
    assert bytes_in(tmp_path) == 50
    with cache.find(key(1), ".bin") as found:
        assert Path(found.path).read_bytes() == b"\1" * 50
    put(cache, 2, 5000).close()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the cache .*file/cache: Not a directory"):
        MediaCache(tmp_path / "file" / "cache", 100)


def test_what_a_killed_process_left_is_thrown_away(tmp_path):
    cache = MediaCache(tmp_path, 100, patience=1)
    put(cache, 1, 10).close()
    left = tmp_path / key(1)[:2] / f".{key(9)}.bin.1.2.partial"
    left.write_bytes(bytes(60))
    (tmp_path / "bytes").write_bytes(b"95")  # what it had claimed
    put(cache, 2, 50).close()
    assert not left.exists()
    assert there(cache, 1)
    (tmp_path / "bytes").unlink()
    put(cache, 3, 40).close()
    assert bytes_in(tmp_path) == 100


def _use(folder: str, seed: int, failures) -> None:
    """Ask for files at random, as a rank does; each must be whole while it is held."""
    cache, chance = MediaCache(folder, 4000, patience=30), random.Random(seed)
    for _ in range(120):
        number = chance.randrange(20)
        size = 100 + 40 * number
        with cache.fetching(key(number)):
            held = cache.find(key(number), ".bin") or put(cache, number, size, 33)
        with held:
            if chance.random() < 0.2:
                time.sleep(0.002)
            if Path(held.path).read_bytes() != bytes([number]) * size:
                failures.put(f"torn: {number}")
        with cache._counted():
            total = bytes_in(Path(folder))
        if total > 4000:
            failures.put(f"{total} bytes")


def test_many_processes_share_a_cache(tmp_path):
    """Whole files and never too many bytes, with twice as much asked for as there is room."""
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    workers = [context.Process(target=_use, args=(str(tmp_path), seed, failures)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = []
    while not failures.empty():
        found.append(failures.get())
    assert not found
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert not list(tmp_path.rglob("*.partial"))
