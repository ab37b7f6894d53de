"""Which backend holds a layer's weights on a device, and why; packing for it; the functional front.

A backend is chosen per device when weights are packed; the kernel within it is chosen per call, by M.
"""

import functools
import logging
from pathlib import Path

import torch

from . import reference
from .backends import Kernel, cpu, cuda, portable, rows, triton
from .errors import FluteError
from .extensions import add_offsets, centred, permuted
from .format import LutTensor
from .layout import ROWS, Layout
from .ops import lut_linear_op, lut_pack_op

logger = logging.getLogger(__name__)

_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


@functools.cache
def backend(device_type: str):
    """(backend module, why) for "cpu" or "cuda"; registers its operators on first use and logs a slow path.

    Raises FluteError for another device and for a VLLM_FLUTE_ISA that this CPU does not have.
    """
    if device_type not in _KEYS:
        raise FluteError(f"device {device_type!r} is not supported: use a CPU or an NVIDIA GPU")
    if device_type == "cpu":
        missing = cpu.load()
        if not missing:
            found = cpu.describe()
            if found["error"]:
                raise FluteError(found["error"])
            return cpu, f"native CPU library, isa {found['isa']}"
    else:
        missing = cuda.load()
        if not missing:
            return cuda, f"native CUDA library, isa {cuda.isa()}"
        without_triton = triton.available()
        if not without_triton:
            why = f"slower path: fused kernels in Triton, because {missing}"
            return _register(triton, device_type, why), why
        missing = f"{missing}; {without_triton}"
    why = f"slow path: dequantize and multiply with torch, because {missing}"
    return _register(portable, device_type, why), why


def _register(module, device_type: str, why: str):
    module.register(_KEYS[device_type])
    logger.warning("vllm-flute on %s: %s", device_type, why)
    return module


def kernels(device_type: str) -> list[Kernel]:
    """The kernels of a device's backend, for doctor and metrics."""
    return backend(device_type)[0].kernels()


def isa(device_type: str) -> str:
    """The instruction set that a device's kernels use."""
    module = backend(device_type)[0]
    if module is cpu:
        return cpu.describe()["isa"]
    return cuda.isa() if module is cuda else module.kernels()[0].isa


def choose(header: torch.Tensor, m: int, dtype: torch.dtype, device_type: str) -> str:
    """The name of the kernel that a call with M tokens would run."""
    module = backend(device_type)[0]
    return module.choose(header, m, dtype) if module in (cpu, cuda) else module.kernels()[0].name


def table_path(device_type: str) -> Path | None:
    """The file of the measured table that chooses a device's kernels; None: an analytic default does."""
    module = backend(device_type)[0]
    return module.table_path() if module in (cpu, cuda) else None


def pack_parts(qweight, scales, codebooks, group_size: int, shards) -> tuple[torch.Tensor, torch.Tensor]:
    """Re-arrange one (possibly fused) layer for its device; returns (packed uint8, header int64 on the CPU).

    Args:
        qweight: uint8 ``[N, K*bits/8]``, all shards one after the other.
        scales: bf16 or fp16 ``[N, K/group_size]``.
        codebooks: fp32 ``[S, 2**bits]``, one row a shard.
        shards: output rows of each shard; they sum to N.
    """
    bits = codebooks.shape[1].bit_length() - 1
    layout = backend(qweight.device.type)[0].layout(codebooks, scales.shape[1] == 1)
    spec = Layout(layout, bits, group_size, qweight.shape[1] * 8 // bits, scales.dtype, tuple(shards))
    header = spec.header()
    return lut_pack_op(qweight.contiguous(), scales.contiguous(), codebooks.contiguous(), header), header


def lut_linear(x: torch.Tensor, t: LutTensor, bias=None, kernel: str | None = None) -> torch.Tensor:
    """``x[..., K] @ W^T + bias`` for a LutTensor on x's device.

    Args:
        x: bf16, fp16 or fp32 ``[..., K]``.
        bias: ``[N]`` in x's dtype, or None.
        kernel: "reference", "triton", a name that ``vllm-flute doctor`` lists, or None for the dispatcher's choice.

    Returns ``[..., N]`` in x's dtype, accumulated in fp32. Raises FluteError for an unknown kernel or shape.
    """
    n, k = t.shape
    if x.shape[-1] != k:
        raise FluteError(f"x has K={x.shape[-1]}, {t.name} has K={k}")
    if kernel == "reference":
        return reference.linear(x, t, bias)
    x, codebook, offsets = permuted(x, t.perm), t.codebook[None], t.offsets
    if offsets is not None:
        if "centred" not in t.packed:
            t.packed["centred"] = centred(codebook, t.scales, offsets, [n])
        codebook, offsets = t.packed["centred"]
    if kernel == triton.NAME:
        if "rows" not in t.packed:
            header = Layout(ROWS, t.bits, t.group_size, k, t.scales.dtype, (n,)).header()
            t.packed["rows"] = rows.pack(t.qweight, t.scales, codebook, header), header
        return add_offsets(triton.linear(x, *t.packed["rows"], bias), x, offsets)
    names = [item.name for item in kernels(x.device.type)]
    if kernel and kernel not in names:
        known = ", ".join(dict.fromkeys(("reference", *names, triton.NAME)))
        raise FluteError(f"unknown kernel {kernel!r} on {x.device.type} (known: {known})")
    if "packed" not in t.packed:
        t.packed["packed"] = pack_parts(t.qweight, t.scales, codebook, t.group_size, [n])
    packed, header = t.packed["packed"]
    try:
        y = lut_linear_op(x, packed, header, bias, n, kernel or "")
    except RuntimeError as e:  # how the native library refuses a call
        raise FluteError(str(e).splitlines()[0]) from e
    return add_offsets(y, x, offsets)
