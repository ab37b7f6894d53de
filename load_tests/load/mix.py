"""User-shaped load: locust runs the users of users.py, each in a thought-out loop of its own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from vllm_flute.errors import FluteError

from . import records
from .target import Target

ROOT = Path(__file__).resolve().parents[2]


def run(users: str, at_once: int) -> Callable:
    """A scenario's run with ``at_once`` users of the class named, or of all classes by their weights."""

    def run_users(target: Target, rate: float, seconds: float, out: Path) -> tuple:
        out.mkdir(parents=True, exist_ok=True)
        record, log = out / "users.jsonl", out / "users.log"
        record.write_text("")
        command = [sys.executable, "-m", "locust", "-f", str(Path(__file__).with_name("users.py")), "--headless"]
        command += ["--host", target.url, "--users", str(at_once), "--spawn-rate", str(at_once)]
        # Those that are in the middle of an answer when the time is over may end it.
        command += ["--run-time", f"{seconds:.0f}s", "--stop-timeout", "120", "--only-summary", *users.split()]
        wanted = {"LOAD_MODEL": target.name, "LOAD_RECORD": str(record), "PYTHONPATH": str(ROOT)}
        with open(log, "w") as stream:
            env = target.environment() | wanted
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=env).returncode
        requests, sent = records.read(record)
        if not sent:
            raise FluteError(f"locust ended with {code} and sent nothing: see {log}")
        return requests, sent

    return run_users
