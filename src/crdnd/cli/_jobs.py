"""Runs side by side: a bounded number of processes, one display, and a clean stop of all of them."""

import logging
import multiprocessing
import multiprocessing.connection
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from crdnd.engine.signals import stop_requests
from crdnd.errors import InputError, Interrupted, RunError, first_line
from crdnd.machine import cores

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

SECONDS_TO_SAVE = 60.0
MOST_BARS = 16
"""More jobs than these get a bar only while they run."""


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Args:
        name: what the display calls it; unique.
        work: a function at module level, called in another process with a reporter of (steps done, steps in all).
        arguments: what else it is called with; picklable.
        after: jobs that must be done first.
        after_end: jobs that must have ended first, done or failed.
    """

    name: str
    work: Callable[..., None]
    arguments: tuple[object, ...]
    after: tuple[str, ...] = ()
    after_end: tuple[str, ...] = ()


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    messages: Connection
    end: tuple[Any, ...] | None = None
    """What the job ended with: ("done",), ("stopped", exit code), ("refused", why) or ("failed", why)."""


def run_jobs(
    jobs: Sequence[Job],
    *,
    processes: int,
    threads: int,
    on_step: Callable[[str, int, int], None],
    on_done: Callable[[str], None],
    on_failed: Callable[[str, str], None] | None = None,
) -> None:
    """Run all jobs, at most `processes` at a time.

    Args:
        jobs: the work; a job starts when those in its `after` are done.
        processes: how many run at once.
        threads: torch threads of each process.
        on_step: called with (name, steps done, steps in all).
        on_done: called with the name of a job that is done.
        on_failed: called with the name of a job that failed or was refused and with why, and so for every job that had
            to come after it; the others go on. Without it such an end stops all.

    Raises:
        InputError, RunError: what a job ended with; the others were stopped and saved what they had.
        Interrupted: Ctrl-C or SIGTERM; all were stopped and saved what they had.
    """
    waiting, done, running = list(jobs), set[str](), list[_Running]()
    # A fork server imports once what every job would import for itself, as it does elsewhere: seconds of each.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(["crdnd.recipe", "crdnd.evaluation", "torch._dynamo", "sklearn.datasets"])
    with stop_requests() as request, _stopped_at_the_end(running):
        while waiting or running:
            left = {job.name for job in waiting} | {entry.job.name for entry in running}
            ready = [job for job in waiting if done.issuperset(job.after) and left.isdisjoint(job.after_end)]
            for job in ready[: processes - len(running)]:
                waiting.remove(job)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(job, sender, threads), name=job.name)
                process.start()
                sender.close()
                running.append(_Running(job, process, receiver))
            multiprocessing.connection.wait([entry.messages for entry in running], timeout=0.5)
            for entry in list(running):
                if not _drained(entry, on_step):
                    continue
                running.remove(entry)
                try:
                    _join(entry)
                except (InputError, RunError) as error:
                    if on_failed is None:
                        raise type(error)(f"{entry.job.name}: {error}") from None
                    waiting = _without(waiting, entry.job.name, str(error), on_failed)
                    continue
                done.add(entry.job.name)
                on_done(entry.job.name)
            if request.exit_code is not None:
                raise Interrupted("", request.exit_code)


def _work(job: Job, sender: Connection, threads: int) -> None:
    """What a process does: the job, with its end told to the parent."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means for its jobs
    torch.set_num_threads(threads)

    def report(step: int, steps: int) -> None:
        sender.send(("step", step, steps))

    try:
        job.work(report, *job.arguments)
        sender.send(("done",))
    except Interrupted as error:
        sender.send(("stopped", error.exit_code))
    except InputError as error:
        sender.send(("refused", str(error)))
    except RunError as error:
        sender.send(("failed", str(error)))
    except BaseException as error:
        sender.send(("failed", f"{type(error).__name__}: {first_line(error)}"))
        raise  # the traceback goes to standard error
    finally:
        sender.close()
        logging.shutdown()


def _drained(entry: _Running, on_step: Callable[[str, int, int], None]) -> bool:
    """Read what a job has said; True when it has ended."""
    latest: tuple[int, int] | None = None
    while entry.end is None and entry.messages.poll():
        try:
            message: tuple[Any, ...] = entry.messages.recv()
        except EOFError:
            message = ("failed", "its process died")
        if message[0] == "step":
            latest = message[1], message[2]
        else:
            entry.end = message
    if latest is not None:
        on_step(entry.job.name, *latest)
    return entry.end is not None


def _join(entry: _Running) -> None:
    """Wait for an ended job's process, and pass on what it ended with."""
    entry.process.join()
    entry.messages.close()
    match entry.end:
        case ("stopped", int(exit_code)):
            raise Interrupted("", exit_code)
        case ("refused", message):
            raise InputError(message)
        case ("failed", message):
            raise RunError(message)
        case _:
            return


def _without(waiting: list[Job], name: str, why: str, on_failed: Callable[[str, str], None]) -> list[Job]:
    """The jobs that can still run after one has failed."""
    on_failed(name, why)
    for job in [job for job in waiting if name in job.after]:
        if job in waiting:  # it may have gone with another one that it waited for
            waiting = _without([other for other in waiting if other is not job], job.name, f"{name}: {why}", on_failed)
    return waiting


class Display:
    """How far each job is, on standard error: bars in a terminal; elsewhere a line for each job that has ended."""

    def __init__(self, names: Sequence[str], reused: Sequence[str], bars: "Progress", console: "Console") -> None:
        self._reused, self._bars, self._console = reused, bars, console
        self._many = len(names) > MOST_BARS
        self._all = bars.add_task("all", total=len(names), state="", visible=self._many)
        self._tasks: dict[str, TaskID] = {
            name: bars.add_task(name, total=None, start=False, state="waiting", visible=not self._many)
            for name in names
        }

    def step(self, name: str, step: int, steps: int) -> None:
        """A job has done so many of its steps."""
        self._bars.start_task(self._tasks[name])
        state = f"step {step} of {steps}" if step < steps else "attacking"
        self._bars.update(self._tasks[name], completed=step, total=steps, state=state, visible=True)

    def done(self, name: str) -> None:
        """A job is done."""
        self._end(name, "reused" if name in self._reused else "done", "")

    def failed(self, name: str, why: str) -> None:
        """A job has failed, or cannot be done because another one has."""
        self._end(name, "failed", f": {why}")

    def _end(self, name: str, state: str, why: str) -> None:
        self._bars.update(self._tasks[name], completed=1, total=1, state=state, visible=not self._many)
        self._bars.stop_task(self._tasks[name])
        self._bars.advance(self._all)
        if why or not self._console.is_terminal:
            self._console.print(f"{name}: {state}{why}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def showing_jobs(names: Sequence[str], reused: Sequence[str] = ()) -> Generator[Display]:
    """A display of jobs while the body runs; those in `reused` were done before."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        yield Display(names, reused, bars, console)


def side_by_side(wanted: int | None, jobs: int) -> int:
    """How many jobs run at once: those wanted, else one a core, or one where they would share the memory of a GPU."""
    import torch

    return wanted or (1 if torch.cuda.is_available() else min(cores(), jobs))


def threads_for(processes: int) -> int:
    """Torch threads of each of so many processes that share this machine."""
    return max(1, cores() // processes)


@contextmanager
def _stopped_at_the_end(running: list[_Running]) -> Generator[None]:
    """Whatever ends the body, no process outlives it: each is asked to save and stop, and killed if it does not."""
    try:
        yield
    finally:
        for entry in running:
            entry.process.terminate()
        deadline = time.monotonic() + SECONDS_TO_SAVE
        for entry in running:
            entry.process.join(max(0.0, deadline - time.monotonic()))
            entry.process.kill()
            entry.process.join()
            entry.messages.close()
