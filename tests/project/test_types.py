"""The list of old type errors only gets shorter."""

import json
from collections.abc import Callable

import pytest

from tests.project import types
from tests.project.types import Finding, beyond, count


@pytest.fixture
def check(tmp_path, monkeypatch) -> Callable[..., int]:
    """Run the command with these errors of mypy and this list; the list is what it leaves."""
    monkeypatch.setattr(types, "BASELINE", tmp_path / "baseline.json")

    def run(found: list[Finding], allowed: types.Counts, *arguments: str) -> int:
        types.BASELINE.write_text(json.dumps(allowed))
        monkeypatch.setattr(types, "run_mypy", lambda: found)
        return types.main(arguments)

    return run


def test_an_error_more_is_shown_and_never_written(check, capsys):
    found = [Finding("a.py", 3, "index", "no"), Finding("a.py", 9, "index", "no, again")]
    for arguments in ((), ("--write",)):
        assert check(found, {"a.py": {"index": 1}}, *arguments) == 1
        assert "a.py:9: no, again  [index]" in capsys.readouterr().out
        assert json.loads(types.BASELINE.read_text()) == {"a.py": {"index": 1}}


def test_a_new_file_and_another_kind_are_held_to_strict(check):
    one = [Finding("b.py", 1, "index", "no")]
    assert check(one, {"a.py": {"index": 5}}) == 1
    assert check(one, {"b.py": {"arg-type": 5}}) == 1


def test_what_is_mended_must_leave_the_list(check, capsys):
    found = [Finding("a.py", 3, "index", "no")]
    allowed = {"a.py": {"index": 2, "misc": 1}, "b.py": {"misc": 1}}
    assert check(found, allowed) == 1
    assert "3 errors less than allowed" in capsys.readouterr().out
    assert check(found, allowed, "--write") == 0
    assert json.loads(types.BASELINE.read_text()) == {"a.py": {"index": 1}}
    assert check(found, {"a.py": {"index": 1}}) == 0


def test_no_error_at_all_is_an_empty_line(check):
    assert types.read_reports("\n") == []
    assert check(types.read_reports("\n"), {"a.py": {"misc": 1}}, "--write") == 0
    assert json.loads(types.BASELINE.read_text()) == {}


def test_counts():
    findings = [Finding("a.py", n, code, "") for n, code in enumerate(("x", "y", "x"))]
    assert count(findings) == {"a.py": {"x": 2, "y": 1}}
    assert beyond({"a.py": {"x": 2, "y": 1}}, {"a.py": {"x": 1, "y": 3}}) == {"a.py": {"x": 1}}
