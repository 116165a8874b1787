"""Ctrl-C and SIGTERM: a run ends between two steps, after it was saved; what is saved as it goes ends at once."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from crdnd.errors import Interrupted

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class StopRequest:
    """Whether a signal asked to stop, and which exit status that means."""

    exit_code: int | None = None


@contextmanager
def stop_requests(*, at_once: bool = False) -> Generator[StopRequest]:
    """Turn the first signal into a request, or into `Interrupted` at once; a second one acts as it would without us.

    Only the main thread may handle signals; elsewhere (a notebook's worker, a server) nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, _frame: FrameType | None) -> None:
        received = signal.Signals(number)
        signal.signal(received, before[received])
        if at_once:
            raise Interrupted("", EXIT_CODES[received])
        request.exit_code = EXIT_CODES[received]

    before = {number: signal.getsignal(number) for number in EXIT_CODES}
    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
