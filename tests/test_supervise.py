"""The supervisor: the status of a server's end, and what a killed one leaves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SUPERVISE = Path(__file__).resolve().parent.parent / "deploy" / "supervise.py"

# A "server" with a process of its own, both with a segment of shared memory mapped; it prints that process's id.
SERVER = """
import subprocess, sys, time
CHILD = '''
import mmap, os, sys, time
with open(sys.argv[1], "wb") as f: f.truncate(4096)
held = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 4096)
print("ready", flush=True)
time.sleep(60)
'''
child = subprocess.Popen([sys.executable, "-c", CHILD, sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def start(code: str, *args) -> subprocess.Popen:
    command = [sys.executable, SUPERVISE, sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("code", "status"),
    [("import sys; sys.exit(3)", 3), ("pass", 1), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137)],
)
def test_the_status_tells_why_a_server_ended(code, status):
    process = start(code)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == status
    assert ("ended by itself" in stderr) == (code == "pass")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_end_may_end_well(number):
    code = "import signal, sys, time\n"
    code += f"signal.signal({int(number)}, lambda *_: sys.exit(0))\nprint('up', flush=True)\ntime.sleep(60)"
    process = start(code)
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.wait(30) == 0


def test_what_a_killed_server_leaves_is_ended_and_removed():
    shared = Path(f"/dev/shm/supervise-test-{os.getpid()}")
    process = start(SERVER, shared)
    orphan = psutil.Process(int(process.stdout.readline()))
    server = orphan.parent()
    time.sleep(3)  # it looks every two seconds
    assert shared.exists()
    server.kill()
    assert process.wait(30) == 137
    assert not orphan.is_running() and not shared.exists()
    assert f"{shared} was left by the server: removed" in process.stderr.read()


def test_a_killed_supervisor_takes_its_server_with_it():
    process = start("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    server = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE


def test_no_command_is_one_message():
    done = subprocess.run([sys.executable, SUPERVISE], capture_output=True, text=True)
    assert done.returncode == 1 and "supervise.py vllm serve" in done.stderr
