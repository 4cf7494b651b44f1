"""The README tells the truth about the tree."""

import re

import pytest

from tests.end_to_end import file_map
from tests.paths import REPO


def test_file_map_matches_the_tree():
    if not (REPO / ".git").exists():
        pytest.skip("no git checkout")
    assert file_map.written() == file_map.render(), "run `python -m tests.end_to_end.file_map`"


def test_tools_and_make_targets_exist():
    text = file_map.README.read_text()
    for tool in set(re.findall(r"tools/\w+\.py", text)):
        assert (REPO / tool).is_file(), tool
    makefile = (REPO / "Makefile").read_text()
    for target in set(re.findall(r"`make ([\w-]+)`", text)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
