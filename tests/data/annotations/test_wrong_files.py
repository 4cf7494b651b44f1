"""A file that holds no annotations is one line with what to do, not a line for each of its own."""

import gzip

import pytest

from megatron_eagle.data.annotations.records import open_records
from megatron_eagle.errors import UserError
from tests.data.helpers import call_tool, make_video


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1}\n'.encode("utf-16"), "is text in UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs"),
        (
            gzip.compress(bytes(257) + b"ustar" + bytes(250), mtime=0),  # the same name on every worker
            "is a packed tar archive; unpack it",
        ),
        (b"PK\x03\x04\n\n\n", "is a zip archive; unpack it"),
        (b"\n\x01\0\n" * 1000, "is a binary file; annotations are JSON lines or a JSON array"),
    ],
)
def test_the_wrong_file(tmp_path, content, said):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"a.jsonl {said}"):
        open_records(tmp_path / "a.jsonl")


def test_a_video_as_annotations(tmp_path):
    make_video(tmp_path / "a.mp4", 5).rename(tmp_path / "a.jsonl")
    failed = call_tool("preview_data", "lint", tmp_path / "a.jsonl")
    assert failed.returncode == 2
    assert [line for line in failed.stderr.splitlines() if "binary file" in line] and not failed.stdout
