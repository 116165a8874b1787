"""Where a file came from: the commit is that of this package's own source, or nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from crdnd import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=ada", "-c", "user.email=ada@example.org", "-c", "commit.gpgsign=false")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a commit, in a folder of which the package's file lies without being part of it."""
    git(tmp_path, "init", "-q")
    (tmp_path / "thesis.txt").write_text("mine")
    git(tmp_path, "add", "thesis.txt")
    git(tmp_path, "commit", "-q", "-m", "Mine")
    source = tmp_path / ".venv" / "crdnd" / "provenance.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(source))
    return tmp_path


def test_the_commit_of_a_repository_around_the_environment_is_not_the_packages(repository):
    assert provenance.commit() is None


def test_the_commit_of_a_checkout_is_told_and_whether_it_was_changed(repository):
    source = Path(provenance.__file__)
    git(repository, "add", "--force", str(source))
    git(repository, "commit", "-q", "-m", "Package")
    commit = git(repository, "rev-parse", "HEAD")
    assert provenance.commit() == commit
    source.write_text("changed")
    assert provenance.commit() == f"{commit}-dirty"


def test_without_git_no_commit_is_told(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    if sys.platform != "win32":
        assert provenance.commit() is None
