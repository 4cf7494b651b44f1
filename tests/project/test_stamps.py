"""A target is run again only if the commit is another, the tree has changes, or it failed."""

import subprocess

import pytest

from tests import stamps


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose targets leave their names in ran.txt; `bad` fails. A function gives what ran."""
    (tmp_path / "run.sh").write_text('echo $1 >> ran.txt; [ "$1" != bad ]\n')
    (tmp_path / ".gitignore").write_text("build/\nran.txt\n")
    monkeypatch.setattr(stamps, "REPO", tmp_path)
    run = subprocess.run

    def here(words, **others):  # targets are run in this process, which knows of the other REPO
        if words[0] != "make":
            return run(words, **others)
        return subprocess.CompletedProcess(words, stamps.main(["run", words[-1], "sh", "run.sh", words[-1]]))

    monkeypatch.setattr(stamps.subprocess, "run", here)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        run([*git, *words], cwd=tmp_path, check=True)

    def ran():
        log = tmp_path / "ran.txt"
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return names

    return tmp_path, ran


def test_what_passed_is_passed_over_until_something_changes(repository, capsys):
    folder, ran = repository
    assert stamps.main(["all", "good", "bad", "test-soak"]) == 1
    assert ran() == ["good", "bad", "test-soak"]
    assert stamps.main(["all", "good", "bad", "test-soak"]) == 1
    assert ran() == ["bad"]
    assert stamps.main(["run", "good", "sh", "run.sh", "good"]) == 0
    assert ran() == ["good"]  # named itself, it runs
    (folder / "run.sh").write_text("echo $1 >> ran.txt\n")
    capsys.readouterr()
    assert stamps.main(["all", "good"]) == 0
    assert ran() == ["good"]
    assert "no stamp" in capsys.readouterr().out
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "-qam", "second"],
        cwd=folder, check=True,
    )  # fmt: skip
    assert stamps.main(["all", "good", "bad"]) == 0
    assert ran() == ["good", "bad"]
    assert stamps.main(["all", "good", "bad"]) == 0
    assert ran() == []
