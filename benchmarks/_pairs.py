"""What the benchmarks share: timing in pairs, the machine's facts, peak memory, and how results are printed.

Times on a shared machine drift by a factor of two within minutes, so a time alone says nothing. Everything that is to
be compared runs in one process, in turns, and what counts is the ratio of the medians.

Printing: progress goes to stderr. Without `--json` the result's lines go to stdout. With `--json` one JSON document is
all there is on stdout, and the lines go to stderr. Either way the last line printed is `ratio <number>`, and the
document holds the same number under "ratio".
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Job = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one callable: the median, the smallest and the largest of its runs, and all of them in order."""

    median: float
    smallest: float
    largest: float
    runs: tuple[float, ...]

    def __str__(self) -> str:
        """Such as '1.234 s (1.200 to 1.300)'."""
        return f"{self.median:.3f} s ({self.smallest:.3f} to {self.largest:.3f})"


def interleaved(
    jobs: Mapping[str, Job], *, repeats: int, warm_up: int = 1, device: torch.device | str = "cpu"
) -> dict[str, Timing]:
    """Time the jobs in turns, after `warm_up` rounds that do not count.

    Each round begins with another job, so that none always runs behind the same neighbour.
    """
    names, seconds = list(jobs), {name: list[float]() for name in jobs}
    for turn in range(-warm_up, repeats):
        progress(f"round {turn + 1} of {repeats}" if turn >= 0 else "warm-up")
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            took = _seconds(jobs[name], torch.device(device))
            if turn >= 0:
                seconds[name].append(took)
    return {name: Timing(statistics.median(runs), min(runs), max(runs), tuple(runs)) for name, runs in seconds.items()}


def _seconds(job: Job, device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    job()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    """A GPU works on after the call has returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times longer the first takes: the ratio of the medians."""
    return slow.median / fast.median


def machine(device: torch.device | str) -> dict[str, Any]:
    """The facts without which a time cannot be read."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{device.type}, {_processor()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_memory(prepare: Callable[[], Job], device: torch.device | str = "cpu") -> int | None:
    """By how many bytes memory grows at most while a job runs, in a fresh process; None where that cannot be read.

    Args:
        prepare: builds the job in the new process; what it leaves in memory does not count. It has to be importable
            (a function of a module, or `functools.partial` of one), because a process that is forked after torch has
            started its threads may hang, so the process is spawned.
        device: on CUDA what torch has allocated counts, elsewhere the process's resident memory.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(prepare, str(device), torch.get_num_threads(), sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the measured process died; its error is above.") from None
    finally:
        process.join()


def _measure(prepare: Callable[[], Job], device: str, threads: int, sender: Any) -> None:
    torch.set_num_threads(threads)
    job = prepare()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        sender.send(torch.cuda.max_memory_allocated(device) - before)
        return
    try:
        # Not getrusage's ru_maxrss: it cannot be reset, and a child starts with the peak of the process it came from.
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        job()
        sender.send(_resident("VmHWM") - before)
    except OSError:
        sender.send(None)


def _resident(field: str) -> int:
    """Bytes of resident memory: now (VmRSS) or at the peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


# --- arguments and results --------------------------------------------------------------------------------------------


def parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--repeats", type=int, default=repeats, help="rounds that count (default %(default)s)")
    result.add_argument("--warm-up", type=int, default=1, help="rounds before them (default %(default)s)")
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's (default %(default)s)")
    result.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    result.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")
    return result


def progress(line: str) -> None:
    """What is going on, on stderr."""
    print(line, file=sys.stderr, flush=True)


def table(rows: Iterable[Sequence[object]]) -> list[str]:
    """Rows as lines with aligned columns."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in texts]


def finish(document: dict[str, Any], lines: Iterable[str], value: float, *, as_json: bool) -> None:
    """Print the result. See the head of this file for what goes where; `ratio` is the last line."""
    if as_json:
        print(json.dumps(document | {"ratio": value}, indent=2, default=_plain), flush=True)
    stream = sys.stderr if as_json else sys.stdout
    for line in (*lines, f"ratio {value:.3f}"):
        print(line, file=stream)
    stream.flush()


def _plain(value: object) -> object:
    if isinstance(value, Timing):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} is not for JSON")
