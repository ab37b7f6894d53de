"""HIGGS (arXiv 2411.17525) as transformers saves it: recognised, and refused.

Its weights are stored in the basis of a Hadamard transform over each `hadamard_size` inputs, so that each layer's
inputs would have to be transformed at run time; and the grid's codes are arranged for one GPU's number of processors
by FLUTE's kernels.
"""

from pathlib import Path

from ...errors import FluteError
from .base import Source, settings

NAME = "higgs"


def detect(path: Path, config: dict) -> bool:
    return settings(config).get("quant_method") == NAME


def open_(path: Path) -> Source:
    raise FluteError(
        f"{path} is in the format HIGGS, whose weights are rotated by a Hadamard transform that its inputs need too: "
        "quantize the unquantized model with 'vllm-flute quantize --calibrate TEXT' instead"
    )
