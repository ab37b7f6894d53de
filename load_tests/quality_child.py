"""Quantizing in a process of its own, whose time and peak memory are those of a user's run."""

import json
import subprocess
import sys

_CODE = """
import json, sys, time
from vllm_flute.checkpoint import quantize_checkpoint
from vllm_flute.cli.walk import peak_memory
begin, marks = time.monotonic(), []
report = quantize_checkpoint(**json.loads(sys.argv[1]), progress=lambda done, total, label: marks.append(
    (label, time.monotonic() - begin)))
print(json.dumps({"seconds": time.monotonic() - begin, "peak_bytes": peak_memory(), "bytes": report.output_bytes,
                  "bits_per_weight": report.bits_per_weight, "marks": marks}))
"""


def quantize_in_child(options: dict) -> dict:
    """`quantize_checkpoint(**options)`: seconds, peak and output bytes, bits a weight, and when each part was done."""
    command = [sys.executable, "-c", _CODE, json.dumps(options)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
