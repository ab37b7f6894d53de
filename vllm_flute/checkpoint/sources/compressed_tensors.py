"""compressed-tensors (llm-compressor): mxfp4-pack-quantized, nvfp4-pack-quantized, and pack-quantized integers.

A layer P has P.weight_packed and P.weight_scale; their dtypes tell the three apart, so that a checkpoint of several
config_groups needs no matching of targets. Source of the layouts: compressed_tensors.compressors.
"""

from pathlib import Path

import torch

from ...codebook import BITS, make_codebook
from ...errors import FluteError
from ...format import LutTensor
from ...packing import pack_codes
from ..config import LayerSpec
from .base import Converted, Directory
from .fp4 import MX_GROUP, NV_GROUP, mxfp4, nvfp4
from .scales import ROUNDED, narrow, stored_group

NAME = "compressed-tensors"
_KV_SCALES = (".k_scale", ".v_scale", ".q_scale", ".prob_scale")
_FLOATS = ("BF16", "F16", "F32")


def unpack(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """lut-v1's qweight uint8 ``[N, K*bits/8]`` of int32 words ``[N, ceil(K / (32 // bits))]``, first code lowest."""
    if 32 % bits == 0:  # the words are already a little-endian bit stream
        return packed.contiguous().view(torch.uint8)[:, : k * bits // 8].contiguous()
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = (packed.unsqueeze(2) >> shifts) & (2**bits - 1)
    return pack_codes(codes.to(torch.uint8).flatten(1)[:, :k].contiguous(), bits)


def integers(packed: torch.Tensor, scales: torch.Tensor, bits: int, k: int, name: str) -> Converted:
    """Symmetric integers of 2 to 4 bits: packed int32 as in `unpack`, scales bf16, fp16 or fp32 ``[N, G]``, ``[1]``.

    Exact with 16-bit scales; those in fp32 are rounded to fp16, and the note says by how much.
    """
    scales = scales.expand(packed.shape[0], 1) if scales.numel() == 1 else scales
    block = k // scales.shape[1]
    group = stored_group(block, k)
    exact = True
    if scales.dtype == torch.float32:
        scales, exact = narrow(scales, torch.float16, f"{name}.weight_scale")
    elif not torch.isfinite(scales).all():
        raise FluteError(f"{name}.weight_scale has values that are not finite: quantize the source again")
    scales = scales.repeat_interleave(block // group, dim=1)
    lut = LutTensor(unpack(packed, bits, k), scales, make_codebook("int", bits), name=name)
    return Converted(lut, exact, "" if exact else ROUNDED)


class CompressedTensors(Directory):
    kind = NAME
    parts = (
        "weight_packed",
        "weight_scale",
        "weight_global_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "input_scale",
        "input_zero_point",
        "input_global_scale",
    )

    def __init__(self, path: Path):
        super().__init__(path)
        config = self.checkpoint.config["quantization_config"]
        formats = {str(config.get("format"))}
        groups = config.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            if isinstance(group, dict):
                formats.add(str(group.get("format")))
                if group.get("input_activations"):
                    self.notes.append("activations are not quantized here, as config.json asks: weights only")
        self.notes = self.notes[:1]
        known = formats & {"mxfp4-pack-quantized", "nvfp4-pack-quantized", "pack-quantized"}
        self.kind = f"{NAME} {' '.join(sorted(known))}".strip()
        if config.get("transform_config"):
            raise FluteError(f"{path}: rotated weights (transform_config) are no lut-v1: quantize without transforms")
        packed = {f"{layer}.weight_scale" for layer in self.layers}
        for name, header in self.headers.items():
            if name.endswith((".weight_scale", ".weight_zero_point", ".bitmask")) and name not in packed | self._owned:
                layer = name.rpartition(".")[0]
                raise FluteError(
                    f"{layer} has {name} ({header.dtype}) but no weight_packed: import reads mxfp4-, nvfp4- and "
                    f"pack-quantized layers, not {', '.join(sorted(formats))}"
                )
        if any(name.endswith(_KV_SCALES) for name in self.headers):
            self.notes.append("scales of a quantized KV cache are left out")

    def tensors(self) -> list[str]:
        return [name for name in super().tensors() if not name.endswith(_KV_SCALES)]

    def spec(self, layer: str) -> LayerSpec:
        for part, why in (("weight_zero_point", "asymmetric"), ("weight_g_idx", "in activation order")):
            if f"{layer}.{part}" in self.headers:
                raise FluteError(
                    f"{layer} is {why} ({part}), which does not fit one table: quantize it symmetric, static"
                )
        packed = self.header(layer, "weight_packed", ("U8", "I32"), 2)
        if packed.dtype == "I32":
            return self._integer_spec(layer)
        scales = self.header(layer, "weight_scale", ("U8", "F8_E8M0", "F8_E4M3"), 2)
        group = NV_GROUP if scales.dtype == "F8_E4M3" else MX_GROUP
        n, k = packed.shape[0], packed.shape[1] * 2
        if k % group or scales.shape != (n, k // group):
            raise FluteError(
                f"{layer}.weight_scale is {scales.dtype} {list(scales.shape)}, expected [{n}, {k}/{group}] beside "
                f"weight_packed {list(packed.shape)}: fetch the checkpoint again"
            )
        if group == NV_GROUP:
            self._factor(layer)
        return LayerSpec(4, group)

    def _factor(self, layer: str) -> str:
        name = f"{layer}.weight_global_scale"
        if name not in self.headers or self.headers[name].numel != 1:
            found = list(self.headers[name].shape) if name in self.headers else "missing"
            raise FluteError(f"{name} is {found}, expected one float32 value: fetch the checkpoint again")
        return name

    def _integer_spec(self, layer: str) -> LayerSpec:
        bits, k = self._integer_shape(layer)
        scales = self.headers[f"{layer}.weight_scale"]
        groups = scales.shape[1] if len(scales.shape) == 2 else 1
        group = stored_group(k // groups, k) if k % groups == 0 else None
        if group is None:
            raise FluteError(f"{layer} has {groups} groups in rows of {k}: lut-v1 has groups of 16 to 256 or a row")
        return LayerSpec(bits, group)

    def _integer_shape(self, layer: str) -> tuple[int, int]:
        """(bits, K) of a pack-quantized layer; raises FluteError where no supported pair fits what is stored."""
        packed, name = self.headers[f"{layer}.weight_packed"], f"{layer}.weight_shape"
        if name not in self.headers or self.headers[name].numel != 2 or self.headers[name].dtype not in ("I64", "I32"):
            raise FluteError(f"{name} is missing or not two integers: fetch the checkpoint again")
        n, k = self.tensor(name).flatten().tolist()
        bits = [b for b in BITS if k > 0 and -(-k // (32 // b)) == packed.shape[1]]
        if n != packed.shape[0] or len(bits) != 1 or k % 8:
            raise FluteError(
                f"{layer}.weight_packed is I32 {list(packed.shape)} of a weight [{n}, {k}]: expected words of 2, 3 or "
                "4 bits, K a multiple of 8"
            )
        scales = self.headers.get(f"{layer}.weight_scale")
        shape = scales.shape if scales else None
        if (
            not scales
            or scales.dtype not in _FLOATS
            or not (shape in ((), (1,)) or (len(shape) == 2 and shape[0] == n))
        ):
            found = f"{scales.dtype} {list(shape)}" if scales else "missing"
            raise FluteError(f"{layer}.weight_scale is {found}, expected bfloat16, float16 or float32 [{n}, K/group]")
        return bits[0], k

    def convert(self, layer: str) -> Converted:
        spec = self.spec(layer)
        packed, scales = self.tensor(f"{layer}.weight_packed"), self.tensor(f"{layer}.weight_scale")
        if packed.dtype == torch.int32:
            _, k = self._integer_shape(layer)
            return integers(packed, scales, spec.bits, k, layer)
        if spec.group_size == NV_GROUP:
            return nvfp4(packed, scales, self.tensor(self._factor(layer)), divide=True, name=layer)
        return mxfp4(packed, scales, layer)


def detect(path: Path, config: dict) -> bool:
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == NAME


def open_(path: Path, allow_lossy: bool) -> CompressedTensors:
    return CompressedTensors(path)
