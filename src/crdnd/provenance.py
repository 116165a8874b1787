"""Where a file came from: versions, the commit, the command."""

import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("crdnd", "torch", "accelerate", "numpy", "safetensors")


def package_versions() -> dict[str, str]:
    """Versions of what decides a number."""
    return {"python": platform.python_version()} | {name: installed_version(name) or "missing" for name in PACKAGES}


def installed_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this package's source, with '-dirty' behind it when changed; None where it is not a checkout."""
    source = Path(__file__)
    # Installed into an environment inside somebody's own repository, this file lies in that but is no part of it.
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    return _git(source.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git answers in a folder; None where it is not installed, or refuses."""
    try:
        answer = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def command() -> str:
    """The command line that this process was started with."""
    program = Path(sys.argv[0])
    # `python -m crdnd` runs a file of that name in the folder of the package.
    return shlex.join([program.parent.name if program.name == "__main__.py" else program.name, *sys.argv[1:]])


_OUTSIDE = re.compile(r"(^|[=,@])(?:(?:~[\w.-]*|[A-Za-z]:)?[\\/]|(?:\.\.[\\/])+)(?:[^\\/=,]+[\\/])*(?=[^\\/])")
_LOGIN = re.compile(r"(?<=://)[^/@]*@")


def without_places(value: Any) -> Any:
    """The same JSON value for readers elsewhere: of a path that leads out of the current folder its last name is left.

    Paths of this machine tell its user's name and are of no use to others; those below the current folder stay.

    >>> without_places({"command": "crdnd train --recipe mine.yaml --out /home/ada/runs/x", "data": "/srv/photographs"})
    {'command': 'crdnd train --recipe mine.yaml --out x', 'data': 'photographs'}
    """
    if isinstance(value, dict):
        return {
            key: _command_without_places(item) if key == "command" and isinstance(item, str) else without_places(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    if not isinstance(value, str):
        return value
    return _LOGIN.sub("", value) if "://" in value else _OUTSIDE.sub(r"\1", value)


def _command_without_places(line: str) -> str:
    try:
        words = shlex.split(line)
    except ValueError:  # no command that this package wrote
        words = line.split()
    return shlex.join(str(without_places(word)) for word in words)
