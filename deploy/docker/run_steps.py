"""Run a Dockerfile's steps in plain Debian roots, without a container engine, and ask the server that comes out.

    python deploy/docker/run_steps.py deploy/docker/Dockerfile.cpu --model MODEL --work DIR

Needs root, debootstrap and chroot. Every stage gets a root of its own made by debootstrap, whatever image FROM names;
FROM, ARG, ENV, SHELL, RUN, COPY, WORKDIR and USER are done, the rest is read. What an earlier run did is kept: a stage
whose steps or files changed since starts again, one that was interrupted goes on. At the end ENTRYPOINT and CMD run as
USER, with MODEL at /model, until the server has answered a completion.
"""

import argparse
import contextlib
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

CONTEXT = Path(__file__).resolve().parent.parent.parent
SUITE = "bookworm"


class Step(NamedTuple):
    """One instruction: its name, its flags (--name=value) and the rest of its text."""

    name: str
    flags: dict[str, str]
    text: str


class Stage(NamedTuple):
    name: str
    image: str
    steps: list[Step]


def parse(text: str) -> list[Stage]:
    """The stages of a Dockerfile; comments between continued lines belong to nobody, as with docker."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\[ \t]*\n", "", "\n".join(lines))
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        name, _, rest = line.partition(" ")
        flags = {}
        while found := re.match(r"--([\w-]+)=(\S+)\s+", rest):
            flags[found[1]] = found[2]
            rest = rest[found.end() :]
        if name.upper() == "FROM":
            image, _, alias = rest.partition(" AS ")
            stages.append(Stage(alias or str(len(stages)), image, []))
        elif not stages:
            raise ValueError(f"{name} before FROM")
        else:
            stages[-1].steps.append(Step(name.upper(), flags, rest.strip()))
    return stages


def expand(text: str, env: dict[str, str]) -> str:
    """$NAME and ${NAME} from ``env``; unknown names are empty."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda m: env.get(m[1] or m[2], ""), text)


def pairs(text: str, env: dict[str, str]) -> dict[str, str]:
    """NAME=value pairs of an ENV or ARG."""
    return dict(item.partition("=")[::2] for item in shlex.split(expand(text, env)))


class Root:
    """A stage's file system while its steps run."""

    def __init__(self, path: Path, binds: list[str]):
        self.path, self.binds = path, binds

    @contextlib.contextmanager
    def mounted(self, *more: str):
        done = []
        try:
            for bind in ["/proc", "/sys", "/dev", "/dev/shm", *self.binds, *more]:
                source, _, target = bind.partition(":")
                inside = self.path / (target or source).lstrip("/")
                inside.parent.mkdir(parents=True, exist_ok=True)
                if Path(source).is_dir():
                    inside.mkdir(exist_ok=True)
                else:
                    inside.touch()
                subprocess.run(["mount", "--bind", source, inside], check=True)
                done.append(inside)
            yield
        finally:
            for inside in reversed(done):
                subprocess.run(["umount", "-l", inside], check=True)

    def command(self, argv: list[str], env: dict[str, str], user: str, folder: str) -> list[str]:
        """A command in the root; chroot knows no working directory, so a shell goes there first."""
        assignments = [f"{name}={value}" for name, value in env.items()]
        inner = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', folder, *argv]
        return ["chroot", *([f"--userspec={user}"] if user else []), str(self.path), "env", "-i", *assignments, *inner]


def copy(step: Step, root: Path, roots: dict[str, Path], folder: str) -> None:
    """COPY from the context or another stage; a folder's contents, not the folder, as docker does."""
    *sources, target = shlex.split(step.text)
    base = roots[step.flags["from"]] if "from" in step.flags else CONTEXT
    to = root / os.path.join(folder, target).lstrip("/")
    for pattern in sources:
        found = glob.glob(str(base / pattern.lstrip("/")))
        if not found:
            raise FileNotFoundError(f"COPY: {pattern} is not there")
        for source in map(Path, found):
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.so") if base == CONTEXT else None
                shutil.copytree(source, to, symlinks=True, dirs_exist_ok=True, ignore=ignored)
            else:
                into = to / source.name if target.endswith("/") or len(sources) > 1 else to
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, into)


def content(step: Step, roots: dict[str, str]) -> str:
    """What decides whether a step must run again, beside its text: the files that it copies, or its source stage."""
    if step.name != "COPY":
        return ""
    if "from" in step.flags:
        return roots[step.flags["from"]]
    total = hashlib.sha256()
    for pattern in shlex.split(step.text)[:-1]:
        for path in sorted(glob.glob(str(CONTEXT / pattern))):
            for file in sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]:
                if file.is_file() and file.suffix != ".so" and "__pycache__" not in file.parts:
                    total.update(str(file.relative_to(CONTEXT)).encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


def chain(stage: Stage, roots: dict[str, str]) -> list[str]:
    """A key for the empty root and one after each step, which all that came before decides."""
    keys = [hashlib.sha256(stage.image.encode()).hexdigest()]
    for step in stage.steps:
        parts = [keys[-1], *map(str, step), content(step, roots)]
        keys.append(hashlib.sha256("\0".join(parts).encode()).hexdigest())
    return keys


class Final(NamedTuple):
    root: Root
    env: dict[str, str]
    user: str
    folder: str
    argv: list[str]


def build(stages: list[Stage], work: Path, binds: list[str], args: dict[str, str]) -> Final:
    roots: dict[str, Path] = {}
    keys: dict[str, str] = {}
    for number, stage in enumerate(stages):
        path, record = work / f"root-{stage.name}", work / f"root-{stage.name}.json"
        done = json.loads(record.read_text()) if record.exists() else []
        wanted = chain(stage, keys)
        root = Root(path, binds)
        if not done or done != wanted[: len(done)]:
            shutil.rmtree(path, ignore_errors=True)
            say(f"[{number}] debootstrap {SUITE} for {stage.image}")
            subprocess.run(["debootstrap", "--variant=minbase", SUITE, path], check=True, stdout=subprocess.DEVNULL)
            done = wanted[:1]
            record.write_text(json.dumps(done))
        env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        given, folder, user, shell = {}, "/", "", ["/bin/sh", "-c"]
        entry: list[str] = []
        command: list[str] = []
        for i, step in enumerate(stage.steps, start=1):
            fresh = i >= len(done)
            match step.name:
                case "ARG":
                    given |= {k: args.get(k, v) for k, v in pairs(step.text, env).items()}
                case "ENV":
                    env |= pairs(step.text, env | given)
                case "SHELL":
                    shell = json.loads(step.text)
                case "WORKDIR":
                    folder = os.path.join(folder, step.text)
                    (path / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
                case "USER":
                    user = step.text
                case "ENTRYPOINT":
                    entry = json.loads(step.text)
                case "CMD":
                    command = json.loads(step.text)
                case "COPY" if fresh:
                    say(f"[{number}] COPY {step.text}")
                    copy(step, path, roots, folder)
                case "RUN" if fresh:
                    say(f"[{number}] RUN {step.text[:100]}")
                    begin = time.monotonic()
                    with root.mounted():
                        subprocess.run(root.command([*shell, step.text], env | given, user, folder), check=True)
                    say(f"    {time.monotonic() - begin:.0f} s")
                case "COPY" | "RUN" | "LABEL" | "EXPOSE" | "HEALTHCHECK":
                    pass
                case other:
                    raise ValueError(f"{other} is not supported")
            if fresh:
                done.append(wanted[i])
                record.write_text(json.dumps(done))
        roots[stage.name], keys[stage.name] = path, wanted[-1]
    return Final(root, env, user, folder, [*entry, *command])


def serve(final: Final, model: Path, port: int, extra: list[str]) -> str:
    """Start what the image starts, and return the answer to one completion."""
    argv = [*final.argv, "--port", str(port), *extra]
    body = {"model": "/model", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    (final.root.path / "model").mkdir(exist_ok=True)
    with final.root.mounted(f"{model.resolve()}:/model"):
        env = final.env | {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
        server = subprocess.Popen(final.root.command(argv, env, final.user, final.folder), start_new_session=True)
        try:
            while server.poll() is None:
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    return json.load(urllib.request.urlopen(request, timeout=120))["choices"][0]["text"]
                time.sleep(1)
            raise RuntimeError(f"the server ended with {server.returncode} before it answered")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="directory for the roots")
    parser.add_argument("--model", type=Path, help="a quantized checkpoint to serve at the end")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--bind", action="append", default=[], metavar="SOURCE[:TARGET]", help="seen by every step")
    parser.add_argument("--port", type=int, default=8009)
    parser.add_argument("--serve-arg", action="append", default=[], help="a further argument of the server")
    args = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        sys.exit("run_steps: needs root and debootstrap")
    args.work.mkdir(parents=True, exist_ok=True)
    binds = ["/etc/resolv.conf", *args.bind]
    final = build(parse(args.dockerfile.read_text()), args.work, binds, dict(a.split("=", 1) for a in args.build_arg))
    if args.model:
        say(f"it answers: {serve(final, args.model, args.port, args.serve_arg)!r}")


if __name__ == "__main__":
    main()
