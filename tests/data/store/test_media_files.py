"""The store's own media: tar files that grow by what is new, and go on wherever a run was stopped."""

import tarfile

import numpy as np
import pytest

from megatron_eagle.data.media.source import open_bytes
from megatron_eagle.data.store.media_files import MediaFiles, holds
from megatron_eagle.data.store.media_names import absolute, is_own, renamed
from tests.data.helpers import contents

SHARD = 8000


@pytest.fixture(scope="module")
def media():
    """Some come again at once, some later; some are larger than a file should be, one is empty of pattern."""
    noise = np.random.default_rng(0)
    new = [noise.bytes(int(size)) for size in noise.integers(1, 4000, 25)]
    return [*new[:5], *new[2:5], *new[5:20], new[0], noise.bytes(3 * SHARD), bytes(512), *new[18:], new[0]]


def write(folder, media, position=(0, 0)):
    """Their names, and the position after each."""
    folder.mkdir(exist_ok=True)
    files = MediaFiles(folder, position, SHARD)
    found = [(files.add(content), files.position) for content in media]
    files.finish()
    return found


def read(path):
    with open_bytes(path) as file:
        return file.read()


def test_what_is_written(tmp_path, media):
    """Every name leads to its content, each content stands once in a file, and the files are tar files."""
    written = write(tmp_path / "d", media)
    assert all(is_own(name) for name, _ in written)
    assert [read(absolute(name, tmp_path / "d")) for name, _ in written] == media
    files = sorted((tmp_path / "d" / "media").iterdir())
    assert [path.name for path in files] == [f"{i:05d}.tar" for i in range(len(files))] and len(files) > 5
    stored = []
    for path in files:
        assert path.stat().st_size <= SHARD + 1024 or path.stat().st_size > 3 * SHARD
        with tarfile.open(path, "r:") as archive:
            own = [archive.extractfile(member).read() for member in archive]
        assert len(set(own)) == len(own)
        stored += own
    assert set(stored) == set(media) and len(stored) < len(media)


@pytest.mark.parametrize("synced", [True, False])
def test_stopped_anywhere(tmp_path, media, synced):
    """After every second medium, with more written than counts: the same bytes."""
    written = write(tmp_path / "expected", media)
    for n in range(1, len(written) + 1, 2):
        position = written[n - 1][1]
        folder = tmp_path / str(n)
        folder.mkdir()
        files = MediaFiles(folder, shard_bytes=SHARD)
        for content in media[: min(n + 3, len(media))]:
            files.add(content)
        files.close() if synced else files.finish()
        assert holds(folder, position)
        assert write(folder, media[n:], position) == written[n:]
        assert contents(folder) == contents(tmp_path / "expected")


def test_lost_files_are_noticed(tmp_path, media):
    written = write(tmp_path / "d", media)
    last = written[-1][1]
    assert holds(tmp_path / "d", last) and holds(tmp_path / "d", (0, 0)) and holds(tmp_path / "none", (0, 0))
    assert not holds(tmp_path / "d", (last[0], last[1] + 2000)) and not holds(tmp_path / "d", (99, 1))
    assert not holds(tmp_path / "none", last)
    (tmp_path / "d" / "media" / "00001.tar").unlink()
    assert not holds(tmp_path / "d", last)


def test_nothing_to_store(tmp_path):
    """A store without own media has no folder for them, and neither has one whose media do not count."""
    assert write(tmp_path / "d", []) == [] and not list((tmp_path / "d").iterdir())
    write(tmp_path / "d", [b"a"])
    MediaFiles(tmp_path / "d").finish()
    assert not list((tmp_path / "d").iterdir())


def test_names(tmp_path):
    """Of pictures, of pictures shown as frames, and of what lies elsewhere."""
    own, frames = "tar://media/00000.tar?offset=512&size=9", "frames://{}?0={}"
    assert absolute(own, tmp_path) == f"tar://{tmp_path}/media/00000.tar?offset=512&size=9"
    for other in (
        "tar:///media/0.tar?offset=512&size=9",
        "media/a.png",
        "frames:///a?0=b.png",
        "pdf:///a?page=1",
    ):
        assert not is_own(other) and absolute(other, tmp_path) == other
    both = renamed("frames:///a?3=b.png&7=c.png", lambda _: own, lambda path: path == "/a/b.png")
    assert is_own(both) and str(tmp_path) not in both
    found = absolute(both, tmp_path)
    assert not is_own(found) and str(tmp_path) in found and "/a/c.png" in found
    assert frames.format("tar://media", "x") != both
