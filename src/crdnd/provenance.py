"""Where a file came from: versions, the commit, the command."""

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
    folder = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],  # noqa: S607
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
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
