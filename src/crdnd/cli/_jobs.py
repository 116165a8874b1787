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
from typing import Any

from crdnd.engine.signals import stop_requests
from crdnd.errors import InputError, Interrupted, RunError

SECONDS_TO_SAVE = 60.0


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Args:
        name: what the display calls it; unique.
        work: a function at module level, called in another process with a reporter of (steps done, steps in all).
        arguments: what else it is called with; picklable.
        after: jobs that must be done first.
    """

    name: str
    work: Callable[..., None]
    arguments: tuple[object, ...]
    after: tuple[str, ...] = ()


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
) -> None:
    """Run all jobs, at most `processes` at a time.

    Args:
        jobs: the work; a job starts when those in its `after` are done.
        processes: how many run at once.
        threads: torch threads of each process.
        on_step: called with (name, steps done, steps in all).
        on_done: called with the name of a job that is done.

    Raises:
        InputError, RunError: what a job ended with; the others were stopped and saved what they had.
        Interrupted: Ctrl-C or SIGTERM; all were stopped and saved what they had.
    """
    waiting, done, running = list(jobs), set[str](), list[_Running]()
    # A fork server imports torch once; elsewhere every process imports it for itself.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(["crdnd.recipe", "crdnd.evaluation"])
    with stop_requests() as request, _stopped_at_the_end(running):
        while waiting or running:
            for job in [job for job in waiting if done.issuperset(job.after)][: processes - len(running)]:
                waiting.remove(job)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(job, sender, threads), name=job.name)
                process.start()
                sender.close()
                running.append(_Running(job, process, receiver))
            multiprocessing.connection.wait([entry.messages for entry in running], timeout=0.5)
            for entry in list(running):
                if _drained(entry, on_step):
                    running.remove(entry)
                    _join(entry)
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
            raise InputError(f"{entry.job.name}: {message}")
        case ("failed", message):
            raise RunError(f"{entry.job.name}: {message}")
        case _:
            return


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
