"""BitNet b1.58 (arXiv 2402.17764) as transformers saves and runs it: ternary matrices with one scale each.

Three ways to store a layer P, by quantization_config (source: transformers.integrations.bitnet):

- packed: P.weight uint8 [N/4, K], bits 2i of a byte hold a row of the i-th quarter of rows, plus one;
- unpacked: P.weight holds -1, 0 and 1 as floats;
- online: P.weight is a plain matrix, rounded at run time by its mean magnitude ("absmean").

P.weight_scale divides where linear_class is bitlinear, and multiplies where it is autobitlinear.
"""

from pathlib import Path

import torch

from ...errors import FluteError
from ...format import LutTensor
from ...packing import pack_codes
from ..config import HEAD, LINEAR, LayerSpec, matches
from .base import Converted, Directory, settings
from .scales import split_power

NAME = "bitnet"
BITS = 2
_FLOATS = ("BF16", "F16", "F32")
_EPSILON = 1e-5  # of the mean magnitude, in transformers' WeightQuant
_CHUNK = 1 << 24  # weights compared at once


def ternary(qweight: torch.Tensor, k: int, value: float, name: str) -> LutTensor:
    """Codes 0, 1, 2 (packed, 2 bits) for -value, 0, value; value is a positive fp32.

    One scale a row, a power of two, and the table ends in a repeated value: what the ternary CPU kernels look for.
    """
    mantissa, power = split_power(value)
    scales = torch.full((qweight.shape[0], 1), power, dtype=torch.bfloat16)
    table = torch.tensor([-mantissa, 0.0, mantissa, mantissa], dtype=torch.float32)
    t = LutTensor(qweight, scales, table, name=name)
    if t.shape[1] != k or not torch.isfinite(scales).all() or not power:
        raise FluteError(f"{name}: K={k} or the scale {value} does not fit lut-v1")
    return t


def repack(packed: torch.Tensor, name: str) -> torch.Tensor:
    """uint8 ``[N/4, K]`` of four rows a byte to lut-v1's uint8 ``[N, K/4]``."""
    rows = []
    for i in range(4):
        codes = (packed >> 2 * i) & 3
        if (codes == 3).any():
            raise FluteError(f"{name}.weight has the code 3, which is no ternary weight: fetch the checkpoint again")
        rows.append(pack_codes(codes, BITS))
    return torch.cat(rows)


def from_values(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Floats -1, 0 and 1 ``[N, K]`` to lut-v1's uint8 ``[N, K/4]``."""
    step = max(1, _CHUNK // weight.shape[1])
    rows = []
    for i in range(0, len(weight), step):
        part = weight[i : i + step].to(torch.float32)
        codes = (part + 1).clamp(0, 2).nan_to_num(3).to(torch.uint8)
        if not torch.equal(codes.to(torch.float32) - 1, part):
            raise FluteError(f"{name}.weight has values other than -1, 0 and 1: is quantization_mode really offline?")
        rows.append(pack_codes(codes, BITS))
    return torch.cat(rows)


def absmean(weight: torch.Tensor, name: str) -> LutTensor:
    """A plain matrix ``[N, K]`` rounded as transformers' WeightQuant does in every forward pass, in fp32."""
    wide = weight.to(torch.float32)
    scale = 1.0 / wide.abs().mean().clamp_(min=_EPSILON)
    if not torch.isfinite(scale) or not scale:
        raise FluteError(f"{name}.weight has values that are not finite: fetch the checkpoint again")
    value = (1.0 / scale).to(weight.dtype).item()
    return ternary(from_values((wide * scale).round_().clamp_(-1, 1), name), weight.shape[1], value, name)


class BitNet(Directory):
    kind = NAME
    parts = ("weight_scale", "weight")

    def __init__(self, path: Path):
        super().__init__(path)
        found = settings(self.checkpoint.config)
        self.divide = found.get("linear_class", "bitlinear") == "bitlinear"
        self.online = found.get("quantization_mode") == "online" and not self.divide
        if found.get("use_rms_norm"):
            raise FluteError(
                f"{path}: use_rms_norm puts a norm before every linear layer, which vLLM's models lack: import reads "
                "BitNet checkpoints without it"
            )
        if self.online:
            left = found.get("modules_to_not_convert") or [HEAD]
            if not isinstance(left, list) or not all(isinstance(entry, str) and entry for entry in left):
                raise FluteError(f"{path}: modules_to_not_convert is {left!r}, expected a list of names")
            names = [name.removesuffix(".weight") for name in self.headers if LINEAR.fullmatch(name)]
            self.layers = [name for name in names if not any(matches(entry, name) for entry in left)]
            self._owned = {f"{layer}.weight" for layer in self.layers}
        self.notes.append("activations are not rounded to 8 bits here: weights only")

    def spec(self, layer: str) -> LayerSpec:
        packed = self.headers.get(f"{layer}.weight") and self.headers[f"{layer}.weight"].dtype == "U8"
        if packed and not self.online:
            weight = self.header(layer, "weight", ("U8",), 2)
        else:
            weight = self.header(layer, "weight", _FLOATS, 2)
            if self.divide:
                raise FluteError(f"{layer}.weight is {weight.dtype}, expected U8: a bitlinear layer is packed")
        if not self.online and (
            (found := self.headers[f"{layer}.weight_scale"]).numel != 1 or found.dtype not in _FLOATS
        ):
            raise FluteError(f"{layer}.weight_scale is {found.dtype} {list(found.shape)}, expected one float")
        if weight.shape[1] % 8:
            raise FluteError(f"{layer} has K={weight.shape[1]}, which is no multiple of 8 and cannot be packed")
        return LayerSpec(BITS, weight.shape[1])

    def _value(self, layer: str) -> float:
        scale = self.tensor(f"{layer}.weight_scale").to(torch.float32).reshape(())
        value = (1 / scale if self.divide else scale).item()
        if not 2.0**-100 < value < 2.0**100:
            raise FluteError(f"{layer}.weight_scale is {scale.item()}, expected a positive number: fetch it again")
        return value

    def convert(self, layer: str) -> Converted:
        weight = self.tensor(f"{layer}.weight")
        if self.online:
            return Converted(absmean(weight, layer), True, f"rounded by absmean, as at run time, in {weight.dtype}")
        qweight = repack(weight, layer) if weight.dtype == torch.uint8 else from_values(weight, layer)
        return Converted(ternary(qweight, weight.shape[1], self._value(layer), layer), True)


def detect(path: Path, config: dict) -> bool:
    return settings(config).get("quant_method") == NAME


def open_(path: Path) -> BitNet:
    return BitNet(path)
