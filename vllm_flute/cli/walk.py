"""What the commands that walk a checkpoint share: a progress bar, readable sizes, peak memory."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

BAR = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("elapsed"),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
)


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar over a checkpoint's shards where stderr is a terminal; yields the callback ``(done, total, label)``."""
    console = Console(stderr=True)
    with Progress(*BAR, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, label: bar.update(
            task, completed=done, total=total, description=f"{what} {label}, peak {size(peak_memory())}".ljust(48)
        )


def report_console() -> Console:
    """Where a command prints its tables: 120 columns where there is no terminal, for which rich takes 80."""
    return Console(width=None if sys.stdout.isatty() else 120)


def size(nbytes: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes.

    Not getrusage, which a process inherits from the one that started it.
    """
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
