"""HIGGS is recognised and refused, whatever else the checkpoint holds."""

import pytest
import torch
from corruption import write_small

from vllm_flute import FluteError
from vllm_flute.checkpoint import import_checkpoint

CONFIG = {"quantization_config": {"quant_method": "higgs", "bits": 4, "p": 1, "hadamard_size": 1024, "group_size": 256}}


def test_refused_with_what_to_do(tmp_path):
    source = write_small(tmp_path / "source", {"a.weight": torch.zeros(4, dtype=torch.int16)}, CONFIG)
    with pytest.raises(FluteError, match="HIGGS.*Hadamard.*vllm-flute quantize") as error:
        import_checkpoint(source, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
