"""Upstream FLUTE's packed order, against tensors that its own packer made.

tests/data/upstream_flute.safetensors holds the first 16 columns of each of those (the order repeats every two), made
from random codes; where the whole ones lie beside the checkout, in shared/upstream_flute, they are read too.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from source_checkpoints import pack_upstream

from vllm_flute import FluteError, LutTensor
from vllm_flute.checkpoint.sources.upstream_flute import ROWS, qweight
from vllm_flute.packing import unpack_codes

HERE = Path(__file__).resolve().parent
COLUMNS = load_file(HERE / "data" / "upstream_flute.safetensors")
NAMES = sorted({name.partition(".")[0] for name in COLUMNS})
WHOLE = HERE.parent.parent / "shared" / "upstream_flute"


def check(bits: int, weight: torch.Tensor, codes: torch.Tensor) -> None:
    assert torch.equal(unpack_codes(qweight(weight, bits, "layer"), bits), codes)
    assert torch.equal(pack_upstream(codes, bits), weight)  # the tests' own packer


@pytest.mark.parametrize("name", NAMES)
def test_golden_columns(name):
    check(int(name[1]), COLUMNS[f"{name}.weight"], COLUMNS[f"{name}.codes"])


@pytest.mark.parametrize("name", NAMES)
def test_whole_golden_tensors(name):
    if not (file := WHOLE / f"{name}.safetensors").exists():
        pytest.skip(f"{file.name} is not beside the checkout")
    stored, bits = load_file(file), int(name[1])
    check(bits, stored["weight"], stored["codes"])
    t = LutTensor(qweight(stored["weight"], bits, name), stored["scales"], stored["tables"].float())
    values = stored["tables"].float()[stored["codes"].int()]
    by_hand = values * stored["scales"].float().repeat_interleave(t.group_size, 1)
    assert torch.equal(t.dequantize(), by_hand)


@given(st.sampled_from([2, 3, 4]), st.integers(1, 3), st.integers(1, 8), st.integers(0, 2**32))
def test_any_shape(bits, blocks, k, seed):
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (blocks * ROWS[bits], 8 * k), generator=random, dtype=torch.uint8)
    check(bits, pack_upstream(codes, bits), codes)


@pytest.mark.parametrize("shape, dtype", [((31, 16), torch.int16), ((32, 12), torch.int16), ((32, 16), torch.int32)])
def test_what_the_packer_does_not_make(shape, dtype):
    with pytest.raises(FluteError, match=r"layer.weight is .* expected int16 \[N/16\*4, K\]"):
        qweight(torch.zeros(shape, dtype=dtype), 4, "layer")
