"""Run a server so that its end is what a supervisor expects: a status that tells, and nothing left behind.

    python deploy/supervise.py vllm serve MODEL --quantization flute --shutdown-timeout 60

vLLM 0.32 ends with status 0 when its engine died, and a killed process leaves its workers' shared memory in /dev/shm.
This passes SIGTERM and SIGINT on, and when the server has ended it

- ends with the server's status, or 1 where the server ended with 0 although nobody asked it to;
- ends the processes that the server started and left, after some seconds of grace;
- removes the shared memory that they had mapped and that no process of this machine maps any more.

Standard library only; Linux.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SHM = "/dev/shm/"
GRACE = 5.0  # seconds that processes whose server is gone get to notice it
LOOK = 2.0  # seconds between looks at what is mapped
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def parents() -> dict[int, int]:
    """Process to parent, of every process that runs; zombies are left out."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state parent ...": the name may hold anything, parentheses too.
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(stat.parent.name)] = int(parent)
    return found


def descendants(root: int) -> list[int]:
    tree, found = parents(), [root]
    for process in found:
        found += [child for child, parent in tree.items() if parent == process]
    return found[1:]


def mapped(processes) -> set[str]:
    """Files of /dev/shm that the processes have mapped."""
    found = set()
    for process in processes:
        with contextlib.suppress(OSError), open(f"/proc/{process}/maps") as maps:
            for line in maps:
                path = line.rstrip("\n").partition(SHM)[2]
                if path and not path.endswith(" (deleted)"):
                    found.add(SHM + path)
    return found


def reap() -> None:
    """Collect ended processes that came to us as orphans."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def clear(seen: set[str]) -> None:
    """End what the server left, then remove the shared memory that was its."""
    deadline = time.monotonic() + GRACE
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        seen |= mapped(left)
        time.sleep(0.1)
        reap()
    for process in left:
        print(f"supervise: process {process} was left by the server: killed", file=sys.stderr)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    while left and descendants(os.getpid()):
        time.sleep(0.05)
    reap()
    for path in sorted(seen - mapped(parents())):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            print(f"supervise: {path} was left by the server: removed", file=sys.stderr)


def main(command: list[str]) -> int:
    if not command:
        sys.exit(__doc__)
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the server come to us
    asked = False

    def end(number, frame) -> None:
        nonlocal asked
        asked = True
        server.send_signal(number)

    # Not even a killed supervisor leaves a server without one.
    server = subprocess.Popen(command, preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    seen: set[str] = set()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = server.wait(LOOK)
            break
        seen |= mapped(descendants(os.getpid()))
    clear(seen)
    if status == 0 and not asked:
        print("supervise: the server ended by itself: status 1", file=sys.stderr)
        return 1
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
