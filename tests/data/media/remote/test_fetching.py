"""Media from an S3 server that fails now and then: fetched whole, or one line; nothing is asked of others."""

import logging
import threading
import time
from pathlib import Path

import pytest

from megatron_eagle.data.media.frame_list import frame_list_name, frame_pictures
from megatron_eagle.data.media.remote.files import MediaAccess
from megatron_eagle.data.media.remote.settings import RemoteSettings
from megatron_eagle.data.media.source import FileMetadata, file_metadata
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem
from tests.data.media.remote.servers import SLOW_SECONDS

CONTENT = bytes(range(256)) * 9_000  # 2.3 MB: three pieces
ADDRESS = "s3://media/a folder/b+c.bin"


@pytest.fixture
def stored(s3):
    client, _ = s3
    client.put_object(Bucket="media", Key="a folder/b+c.bin", Body=CONTENT)
    return s3


def opened(folder: Path, *hosts: str, **settings) -> MediaAccess:
    given = {"attempts": 3, "timeout_s": 5.0, "cache_bytes": 10**8, **settings}
    return MediaAccess(RemoteSettings(hosts or ("s3://media",), str(folder / "cache"), **given))


def fetch(files: MediaAccess, address: str = ADDRESS, probed: FileMetadata | None = None) -> bytes:
    with files.local(address, probed) as local:
        return Path(local).read_bytes()


def test_it_is_fetched_once_and_then_read_from_the_cache(stored, tmp_path):
    _, proxy = stored
    files = opened(tmp_path)
    assert fetch(files) == CONTENT
    probed = files.metadata(ADDRESS)
    with files.local(ADDRESS) as local:
        found = file_metadata(local)
        assert (
            (found.size, found.mtime_ns) == (probed.size, probed.mtime_ns) == (len(CONTENT), found.mtime_ns)
        )
        assert local.endswith(".bin")
    asked = len(proxy.requests)
    for _ in range(3):
        assert fetch(files, probed=probed) == CONTENT
        assert fetch(opened(tmp_path), probed=probed) == CONTENT  # another process
    assert len(proxy.requests) == asked
    assert [request.split()[0] for request in proxy.requests] == ["GET", "HEAD", "GET"]


@pytest.mark.parametrize("faults", [["503"], ["cut"], ["long"], ["cut", "503"], ["500", "long"]])
def test_what_fails_is_tried_again(stored, tmp_path, faults):
    _, proxy = stored
    proxy.faults.extend(faults)
    assert fetch(opened(tmp_path)) == CONTENT
    assert len(proxy.requests) == len(faults) + 1


def test_what_is_too_slow_is_tried_again(stored, tmp_path):
    _, proxy = stored
    proxy.faults.append("slow")
    assert fetch(opened(tmp_path, timeout_s=SLOW_SECONDS / 5)) == CONTENT
    assert len(proxy.requests) == 2


@pytest.mark.parametrize(
    "faults, line",
    [
        (["503"] * 3, "unreachable media: {}: HTTP 503, 3 times"),
        (["cut"] * 3, "unreachable media: {}: .*, 3 times"),
        (["long"] * 3, "unreachable media: {}: .*, 3 times"),
        (["404"], r"missing media: {} \(404\)$"),
        (["403"], r"no access to media: {} \(403\)$"),
        (["418"], r"unreachable media: {} \(418\)$"),
    ],
)
def test_what_cannot_be_had_is_one_line(stored, tmp_path, faults, line):
    _, proxy = stored
    proxy.faults.extend(faults)
    files = opened(tmp_path)
    with pytest.raises(Problem, match=line.format(ADDRESS.replace("+", r"\+"))) as caught:
        fetch(files)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert not proxy.faults and len(proxy.requests) == len(faults)
    left = [path for path in (tmp_path / "cache").rglob("*.bin*")]
    assert not left
    assert fetch(files) == CONTENT


def test_a_server_that_is_gone_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        Problem, match="unreachable media: s3://media/x: EndpointConnectionError: .*, 2 times"
    ):
        fetch(opened(tmp_path, attempts=2), "s3://media/x")


def test_missing_credentials_are_named(stored, tmp_path, monkeypatch):
    client, proxy = stored
    client.put_object_acl(Bucket="media", Key="a folder/b+c.bin", ACL="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    proxy.faults.append("403")
    with pytest.raises(
        Problem, match=r"\(403\); the environment has no credentials for s3:// \(AWS_ACCESS_KEY_ID"
    ):
        fetch(opened(tmp_path))
    assert fetch(opened(tmp_path)) == CONTENT  # anonymously
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY is not"):
        opened(tmp_path)


def test_a_changed_object_is_refused_where_it_was_probed(stored, tmp_path):
    client, _ = stored
    files = opened(tmp_path)
    probed = files.metadata(ADDRESS)
    client.put_object(Bucket="media", Key="a folder/b+c.bin", Body=CONTENT[::-1])  # as many bytes
    with pytest.raises(Problem, match="media changed since preprocessing: .* has another ETag or size"):
        fetch(files, probed=probed)
    assert fetch(files) == CONTENT[::-1]
    client.put_object(Bucket="media", Key="a folder/b+c.bin", Body=CONTENT)
    assert fetch(files, probed=probed) == CONTENT  # the same ETag: the same object


def test_it_may_change_while_it_is_read_elsewhere(stored, tmp_path):
    """What a run has probed stays in its cache beside what another run finds later."""
    client, _ = stored
    files = opened(tmp_path)
    probed = files.metadata(ADDRESS)
    assert fetch(files, probed=probed) == CONTENT
    client.put_object(Bucket="media", Key="a folder/b+c.bin", Body=b"new")
    assert fetch(files) == b"new"
    assert fetch(files, probed=probed) == CONTENT


@pytest.mark.parametrize(
    "address", ["s3://other/b", "s3://media2/b", "gs://media/b", "https://media/b", "s3://medi/a"]
)
def test_nothing_is_asked_of_hosts_that_are_not_named(stored, tmp_path, address):
    _, proxy = stored
    files = opened(tmp_path)
    for ask in (fetch, MediaAccess.metadata):
        with pytest.raises(Problem, match=f"remote media are off: {address}: the run does not name"):
            ask(files, address)
        with pytest.raises(Problem, match="remote media are off"):
            ask(MediaAccess(), address)
    with pytest.raises(Problem, match="remote media are off"):
        fetch(opened(tmp_path, "s3://media/other"))
    for reader in (file_metadata,):
        with pytest.raises(Problem, match="remote media are off"):
            reader(ADDRESS)
    assert proxy.connections == 0
    assert fetch(opened(tmp_path, "s3://media/a folder")) == CONTENT
    assert proxy.connections > 0


def test_readers_of_one_machine_fetch_a_file_once(stored, tmp_path):
    _, proxy = stored
    files = [opened(tmp_path) for _ in range(4)]
    probed = files[0].metadata(ADDRESS)
    asked, found = len(proxy.requests), []
    threads = [
        threading.Thread(target=lambda own: found.append(fetch(own, probed=probed)), args=(files[i % 4],))
        for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 12
    assert len(proxy.requests) == asked + 1


def test_names_with_addresses_in_them(stored, tmp_path):
    """Members, pages and frames of remote files are those of the cached ones; others are as they are."""
    client, _ = stored
    for name in ("1.png", "2.png"):
        client.put_object(Bucket="media", Key=f"f/{name}", Body=name.encode())
    files = opened(tmp_path)
    for form in (
        "tar://{}?offset=512&size=7",
        "pdf://{}?page=2&size=448x896",
        "pdf://zip://{}?offset=1&size=2?page=1&size=4x4",
    ):
        with files.local(form.format(ADDRESS)) as local:
            before, _, after = form.partition("{}")
            assert local.startswith(f"{before}/") and local.endswith(after)
            assert Path(local.removeprefix(before).removesuffix(after)).read_bytes() == CONTENT
        with files.local(form.format("/a/b.bin")) as local:
            assert local == form.format("/a/b.bin")
    member = files.metadata(f"tar://{ADDRESS}?offset=512&size=7")
    assert (member.size, member.mtime_ns) == (7, files.metadata(ADDRESS).mtime_ns)
    video = frame_list_name({3: "s3://media/f/1.png", 5: "s3://media/f/2.png"})
    with files.local(video) as local:
        contents = {number: Path(path).read_bytes() for number, path in frame_pictures(local).items()}
        assert contents == {3: b"1.png", 5: b"2.png"}
        assert file_metadata(local).mtime_ns == files.metadata(video).mtime_ns
    assert files.metadata(video).size == 10
    beside = frame_list_name({0: "/a/1.png"})
    with files.local(beside) as local:
        assert local == beside


def test_problems_speak_of_the_address(stored, tmp_path):
    files = opened(tmp_path)
    with (
        pytest.raises(Problem, match="unreadable image: s3://media/a folder/b") as caught,
        files.local(ADDRESS) as local,
    ):
        raise Problem("unreadable image", f"{local}: broken")
    assert "cache" not in str(caught.value)


def test_credentials_are_in_no_log(stored, tmp_path, caplog):
    _, proxy = stored
    proxy.faults.extend(["503", "cut", "403"])
    with caplog.at_level(logging.INFO), pytest.raises(Problem):
        fetch(opened(tmp_path))
    assert "secret" not in caplog.text


def test_waiting_between_tries_grows(stored, tmp_path, monkeypatch):
    from megatron_eagle.data.media.remote import files as module

    _, proxy = stored
    waits = []
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.5)
    monkeypatch.setattr(time, "sleep", waits.append)
    proxy.faults.extend(["503"] * 8)
    with pytest.raises(Problem, match="HTTP 503, 8 times"):
        fetch(opened(tmp_path, attempts=8))
    waits = [wait for wait in waits if wait > 0.2]
    assert len(waits) == 7 and waits == sorted(waits) and 5 <= waits[-1] <= 15
