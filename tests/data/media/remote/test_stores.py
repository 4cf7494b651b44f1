"""Google's store, the hub and web servers: the same bytes, their identity, and redirects."""

from pathlib import Path

import pytest

from megatron_eagle.data.media.remote.addresses import below, is_remote, parse_address, parse_place
from megatron_eagle.data.media.remote.files import MediaAccess
from megatron_eagle.data.media.remote.settings import RemoteSettings
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem
from tests.data.media.remote.servers import Google, Hub, Server, Web
from tests.data.media.remote.test_fetching import fetch, opened

CONTENT = bytes(range(256)) * 8000


def port(server: Server) -> str:
    return server.url.rpartition(":")[2]


@pytest.fixture
def google(monkeypatch):
    with Google(objects={"media/a/b c.jpg": (5, CONTENT)}).running() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


def test_google(google, tmp_path):
    files = opened(tmp_path, "gs://media/a")
    address = "gs://media/a/b c.jpg"
    assert fetch(files, address) == CONTENT
    probed = files.metadata(address)
    assert probed.size == len(CONTENT)
    asked = len(google.requests)
    assert fetch(files, address, probed) == CONTENT and len(google.requests) == asked
    google.objects["media/a/b c.jpg"] = (6, CONTENT[::-1])
    assert fetch(files, address) == CONTENT[::-1]
    with pytest.raises(Problem, match="media changed since preprocessing: .*another generation"):
        fetch(opened(tmp_path / "new", "gs://media"), address, probed)
    with pytest.raises(Problem, match=r"missing media: gs://media/a/none.jpg \(404\)"):
        fetch(files, "gs://media/a/none.jpg")
    google.faults.append("403")
    with pytest.raises(Problem, match=r"\(403\); the environment has no credentials for gs:// \(GOOGLE_APP"):
        fetch(opened(tmp_path / "third", "gs://media"), address)


def test_googles_object_that_changes_while_it_is_read(google, tmp_path, monkeypatch):
    """Its parts are of one generation."""
    from megatron_eagle.data.media.remote import stores

    monkeypatch.setattr(stores, "_RANGE", 1 << 20)
    new = CONTENT[::-1]

    class Changing(Google):
        def answer(self, method, path, headers):
            answer = super().answer(method, path, headers)
            if "alt=media" in path:
                self.objects["media/a/b c.jpg"] = (7, new)
            return answer

    google.__class__ = Changing
    assert fetch(opened(tmp_path, "gs://media"), "gs://media/a/b c.jpg") == new


@pytest.fixture
def hub(web, monkeypatch):
    web.files["/blob?signed"] = CONTENT
    with Hub(
        small={"a/b c.jpg": b"small"}, large={"a/d.mp4": (CONTENT, f"{web.url}/blob?signed")}
    ).running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.mark.parametrize("revision", ["", "@main"])
def test_the_hub(hub, web, tmp_path, revision):
    place = f"hf://datasets/owner/name{revision}"
    files = opened(tmp_path, "hf://datasets/owner/name", f"https://localhost:{port(web)}")
    assert fetch(files, f"{place}/a/b c.jpg") == b"small"
    assert fetch(files, f"{place}/a/d.mp4") == CONTENT
    probed = files.metadata(f"{place}/a/d.mp4")
    assert probed.size == len(CONTENT)
    asked = len(hub.requests)
    assert fetch(files, f"{place}/a/d.mp4", probed) == CONTENT and len(hub.requests) == asked
    with pytest.raises(Problem, match=r"missing media: .*none.jpg \(404\)"):
        fetch(files, f"{place}/a/none.jpg")


def test_the_hub_leads_only_to_hosts_that_are_named(hub, web, tmp_path):
    files = opened(tmp_path, "hf://datasets/owner/name")
    with pytest.raises(Problem, match="redirect refused: .*/a/d.mp4 leads to https://localhost") as caught:
        fetch(files, "hf://datasets/owner/name/a/d.mp4")
    assert "signed" not in str(caught.value) and web.connections == 0


def test_what_comes_from_the_hub_has_its_hash(hub, tmp_path):
    """A proxy that gives other bytes, as many as were promised."""

    class Lying(Hub):
        def answer(self, method, path, headers):
            answer = super().answer(method, path, headers)
            answer.body = answer.body[::-1]
            return answer

    hub.__class__ = Lying
    with pytest.raises(
        Problem, match="unreachable media: .* does not have the hash that the hub gives, 3 times"
    ):
        fetch(opened(tmp_path, "hf://datasets/owner/name"), "hf://datasets/owner/name/a/b c.jpg")


def test_the_token_goes_to_the_hub_alone(hub, web, tmp_path, monkeypatch):
    seen: dict[str, list[str]] = {"hub": [], "web": []}

    def noting(kind, name):
        class Noting(kind):
            def answer(self, method, path, headers):
                seen[name].append(headers.get("Authorization", "") or headers.get("authorization", ""))
                return super().answer(method, path, headers)

        return Noting

    hub.__class__, web.__class__ = noting(Hub, "hub"), noting(Web, "web")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    files = opened(tmp_path, "hf://datasets/owner/name", f"https://localhost:{port(web)}")
    assert fetch(files, "hf://datasets/owner/name/a/d.mp4") == CONTENT
    assert seen == {"hub": ["Bearer hf_secret"] * 2, "web": [""]}


def test_a_web_server(web, tmp_path):
    web.files["/a/b%20c.jpg?size=1"] = CONTENT
    host = f"https://localhost:{port(web)}"
    files = opened(tmp_path, host)
    address = f"{host}/a/b c.jpg?size=1"
    assert fetch(files, address) == CONTENT
    probed = files.metadata(address)
    assert fetch(files, address, probed) == CONTENT
    assert [request.split()[0] for request in web.requests] == ["GET", "HEAD"]
    web.knows_head = False
    assert files.metadata(address) == probed
    web.faults.extend(["cut", "503"])
    assert fetch(opened(tmp_path / "new", host), address, probed) == CONTENT
    with pytest.raises(Problem, match=r"missing media: .*/none.jpg \(404\)"):
        fetch(files, f"{host}/none.jpg")


def test_a_web_server_that_names_no_version(web, tmp_path):
    """A file that only its size tells apart is refused, at once, when it is asked for and when fetched."""
    web.files["/a.jpg"], web.knows_tags = CONTENT, False
    files = opened(tmp_path, web.url)
    for ask in (files.metadata, lambda address: fetch(files, address)):
        with pytest.raises(Problem, match="media without identity: .*/a.jpg: the server gives neither an"):
            ask(f"{web.url}/a.jpg")
    assert [request.split()[0] for request in web.requests] == ["HEAD", "GET", "GET"]
    web.knows_tags = True
    assert fetch(files, f"{web.url}/a.jpg") == CONTENT


def test_marks_in_the_names_of_web_files(web, tmp_path):
    """Relative to a root they are of a file's name; an address ends at a #: another file would come."""
    web.files |= {"/f/a%231%3F.jpg": CONTENT, "/f/a": b"another"}
    files = opened(tmp_path, web.url)
    assert fetch(files, below(f"{web.url}/f", "a#1?.jpg")) == CONTENT
    with pytest.raises(Problem, match="bad media reference: .* has a #, .* of a file's name it is %23"):
        fetch(files, f"{web.url}/f/a#1?.jpg")
    assert below("s3://b/f", "a#1?.jpg") == "s3://b/f/a#1?.jpg"


def test_redirects_of_a_web_server(web, certificate, tmp_path):
    with Web(files={"/new.jpg": CONTENT}, files_of_certificate=certificate).running() as other:
        web.files["/here.jpg"] = b"here"
        web.redirects = {
            "/old.jpg": "/here.jpg",
            "/far.jpg": f"{other.url}/new.jpg?token=secret",
            "/plain.jpg": f"http://localhost:{port(other)}/new.jpg",
            "/loop.jpg": "/loop.jpg",
        }
        host = f"https://localhost:{port(web)}"
        alone = opened(tmp_path, host)
        assert fetch(alone, f"{host}/old.jpg") == b"here"
        for name in ("far", "plain"):
            with pytest.raises(
                Problem, match=f"redirect refused: .*/{name}.jpg leads to http.*none of the"
            ) as caught:
                fetch(alone, f"{host}/{name}.jpg")
            assert "secret" not in str(caught.value)
        with pytest.raises(Problem, match="more than 5 redirects"):
            fetch(alone, f"{host}/loop.jpg")
        assert other.connections == 0
        both = opened(tmp_path / "both", host, other.url)
        other.files["/new.jpg?token=secret"] = CONTENT
        assert fetch(both, f"{host}/far.jpg") == CONTENT
        assert other.connections == 1


def test_a_certificate_that_nobody_vouches_for(web, tmp_path, monkeypatch):
    web.files["/a.jpg"] = CONTENT
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(Problem, match="unreachable media: .*certificate verify failed"):
        fetch(opened(tmp_path, web.url, attempts=1), f"{web.url}/a.jpg")


@pytest.mark.parametrize(
    "text, why",
    [
        ("https://user:pass@host/a.jpg", "a name or password"),
        ("https://host/a.jpg?X-Amz-Signature=abc", "signed by X-Amz-Signature"),
        ("https://host/a.jpg?x=1&token=abc", "signed by token"),
        ("https://host/a.jpg?x=1;token=abc", "signed by token"),
        ("https://host/a.jpg#access_token=abc", "signed by access_token"),
        ("https://host/a.jpg?Pass%77ord=abc", "signed by Password"),
        ("https://host", "names no file"),
        ("s3://bucket", "names no file"),
        ("s3:///key", "names no bucket"),
        ("s3://bucket/a/../../b", "has .. in"),
        ("s3://bucket/a\\b", "a backslash"),
        ("https://good\\@evil/a", "a name or password|names no bucket"),
        ("hf://datasets/name/a.jpg", "names no file"),
        ("https://host:port/a", "[Pp]ort"),
        ("s3://id:abc@bucket/a", "names no bucket"),
        ("s3://id:abc/rest-of-abc@bucket/a", "names no bucket"),
        ("HTTP://user:abc@host/a", "is no address"),
        ("ftp://host/a?sig=abc", "is no address"),
        ("https://host/f/%2e%2E/b", "has .. in its path"),
        ("https://host/f/..%2fb", "has .. in its path"),
    ],
)
def test_bad_addresses_are_one_line(text, why):
    with pytest.raises(Problem, match=f"bad media reference: .*({why})") as caught:
        parse_address(text)
    assert "abc" not in str(caught.value) and "pass@" not in str(caught.value)


def test_addresses():
    for text in (
        "s3://b/k?x#y z",
        "gs://b/a/b",
        "https://host:8443/a?b=c",
        "https://[::1]:8443/a",
        "s3://b/%2e%2e/a",
        "hf://datasets/o/n@r1/a/b",
        "hf://o/n/a",
    ):
        assert str(parse_address(text)) == text
    assert str(parse_address("https://Host:443/A")) == "https://host/A"
    assert is_remote("HTTPS://host/a") and str(parse_address("HTTPS://host/a")) == "https://host/a"
    assert (
        below("s3://b/f", "a/../c.jpg") == "s3://b/f/c.jpg"
        and below("hf://datasets/o/n@r", "c") == "hf://datasets/o/n@r/c"
    )
    for path in ("../../c", "..", "../.."):
        with pytest.raises(Problem, match="no file below"):
            below("s3://b/f", path)
    held = parse_place("s3://b/f")
    assert held.holds(parse_address("s3://b/f/c")) and not held.holds(parse_address("s3://b/fc"))


def test_settings_that_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="^cache is not set"):
        RemoteSettings(("s3://b",))
    with pytest.raises(ValueError, match="^hosts: 'ftp://b' is no address"):
        RemoteSettings(("ftp://b",), "c")
    with pytest.raises(ValueError, match="^cache_bytes is 5"):
        RemoteSettings(("s3://b",), "c", 5)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/none")
    with pytest.raises(UserError, match="names no file"):
        RemoteSettings(("gs://b",), "c")
    assert MediaAccess(RemoteSettings())
    assert not Path("c").exists()


@pytest.mark.parametrize("scheme, package", [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp")])
def test_a_missing_package_is_one_line(monkeypatch, scheme, package):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(
        UserError, match=rf"media at {scheme}:// need {package}: pip install 'megatron-eagle\[remote\]'"
    ):
        RemoteSettings((f"{scheme}://b",), "c")
