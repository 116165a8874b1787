"""The command line. Every command is a thin layer of options over the Python API."""

from crdnd.cli._main import main

__all__ = ["main"]
