"""The three ways a call can end without a result, and the exit status each one has on the command line."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What the caller handed in cannot be used; the message is one line that names the setting and the fix. Exit 2."""


class RunError(RuntimeError):
    """The run or the machine failed (a loss that is NaN, a full disk); nothing saved before is lost. Exit 1."""


class DivergenceError(RunError):
    """The loss or the weights are not finite any more; the same run would end so again."""


class Interrupted(BaseException):
    """A signal stopped the run after its state was saved. Exit 130 for Ctrl-C, 143 for SIGTERM.

    No `Exception`, so that a caller's `except Exception` does not swallow the user's wish to stop; no
    `KeyboardInterrupt`, because frameworks turn that into messages of their own.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    r"""What an exception says, for a message of one line; its type where it says nothing.

    >>> first_line(ValueError("no such thing\nand more")), first_line(KeyError())
    ('no such thing', 'KeyError')
    """
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return '; did you mean ...?' when a known word is close, and the list of what exists.

    >>> did_you_mean("rslda", ["ard", "rslad"])
    "; did you mean 'rslad'? Available: ard, rslad"
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]!r}?" if close else ".") + f" Available: {', '.join(names)}"
