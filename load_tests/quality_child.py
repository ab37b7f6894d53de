"""Quantizing in a process of its own, whose time and peak memory are those of a user's run."""

import json
import subprocess
import sys

_QUANTIZE = """
import json, sys, time
from vllm_flute.checkpoint import quantize_checkpoint
from vllm_flute.cli.walk import peak_memory
begin, marks = time.monotonic(), []
report = quantize_checkpoint(**json.loads(sys.argv[1]), progress=lambda done, total, label: marks.append(
    (label, time.monotonic() - begin)))
print(json.dumps({"seconds": time.monotonic() - begin, "peak_bytes": peak_memory(), "bytes": report.output_bytes,
                  "bits_per_weight": report.bits_per_weight, "marks": marks}))
"""

# The walk that learns scales, upon weights that are only rounded.
_LEARN = """
import json, sys, time
from vllm_flute.checkpoint import Checkpoint, learned, quantize_checkpoint
from vllm_flute.checkpoint.calibrate import calibration_tokens
from vllm_flute.cli.walk import peak_memory

class Written(Checkpoint):
    def names(self, prefix):
        return [name for name in self.headers if name.startswith(prefix)]

options, learned.UPDATES = json.loads(sys.argv[1]), int(sys.argv[2])
learned._KEPT = 0  # as with all layers of a large model, of which these are a few
text, tokens = options.pop("calibrate"), options.pop("tokens")
quantize_checkpoint(**options, method="absmax")
source, marks = Checkpoint(options["src"]), []
ids = calibration_tokens(source, text, tokens)
begin = time.monotonic()
learned.learn_scales(source, Written(options["out"]), ids, lambda done, total, label: marks.append(
    (label, time.monotonic() - begin)))
updates = [at for label, at in marks if label.startswith("scales")]
print(json.dumps({"before": marks[-1 - len(updates)][1], "update": (updates[-1] - updates[0]) / (len(updates) - 1),
                  "peak_bytes": peak_memory()}))
"""


def quantize_in_child(options: dict) -> dict:
    """`quantize_checkpoint(**options)`: seconds, peak and output bytes, bits a weight, and when each part was done."""
    return _in_child(_QUANTIZE, json.dumps(options))


def learn_in_child(options: dict, updates: int) -> dict:
    """`learn_scales` with so few updates: seconds before the first and of one, and the peak in bytes.

    Args:
        options: ``src``, ``out``, ``calibrate``, ``tokens`` and the others of `quantize_checkpoint`.
    """
    return _in_child(_LEARN, json.dumps(options), str(updates))


def _in_child(code: str, *arguments: str) -> dict:
    command = [sys.executable, "-c", code, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
