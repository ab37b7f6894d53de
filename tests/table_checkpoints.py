"""Small whole checkpoints of bitsandbytes, compressed-tensors, ModelOpt, gpt-oss's MXFP4 and BitNet.

The packing of each is the source library's own where one is named, else written from its documentation.
"""

import json
from pathlib import Path

import torch
from source_checkpoints import HIDDEN, INTERMEDIATE, LAYERS, Made, quantize_linears, write

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def bitsandbytes_parts(weight: torch.Tensor, table: str = "nf4", block: int = 64, nested: bool = False):
    """(tensors of a layer by their suffix, its float32 weight) by bitsandbytes itself."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=table, compress_statistics=nested)
    parts = {"weight": packed} | {f"weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    state.dtype = torch.float32
    return parts, bnb.dequantize_4bit(packed, state)


def make_bitsandbytes(path: Path, table: str = "nf4", block: int = 64, nested: bool = False) -> Made:
    def make(layer, weight):
        parts, exact = bitsandbytes_parts(weight.bfloat16(), table, block, nested)
        return {f"{layer}.{part}": t for part, t in parts.items()}, exact

    stored, weights = quantize_linears(make, torch.bfloat16)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": table}
    settings |= {"bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": "bfloat16", "load_in_8bit": False}
    write(path, stored, settings, torch.bfloat16)
    return Made(path, weights)


def to_fp4(weight: torch.Tensor, scales: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(e2m1 values, bytes uint8 [N, K/2] with the even input in the low nibble) nearest to weight / scales."""
    ratio = weight / scales.repeat_interleave(group, 1).clamp(min=1e-30)
    index = (ratio.abs()[..., None] - E2M1).abs().argmin(-1)
    sign = ratio < 0
    codes = (index + 8 * sign).to(torch.uint8)
    return E2M1[index] * torch.where(sign, -1.0, 1.0), codes[:, ::2] | codes[:, 1::2] << 4


def nvfp4_parts(weight: torch.Tensor, factor: float):
    """(bytes, e4m3 scales [N, K/16], values e2m1): ``weight`` is about ``values * scales * factor``."""
    scales = (weight.view(len(weight), -1, 16).abs().amax(-1) / 6 / factor).to(torch.float8_e4m3fn)
    values, packed = to_fp4(weight, scales.float() * factor, 16)
    return packed, scales, values


def mxfp4_parts(weight: torch.Tensor):
    """(bytes, e8m0 scales uint8 [N, K/32], exact weight)."""
    exponents = torch.floor(torch.log2(weight.view(len(weight), -1, 32).abs().amax(-1))) - 2
    scales = torch.exp2(exponents)
    values, packed = to_fp4(weight, scales, 32)
    return packed, (exponents + 127).to(torch.uint8), values * scales.repeat_interleave(32, 1)


def make_nvfp4(path: Path, modelopt: bool = False) -> Made:
    def make(layer, weight):
        factor = torch.tensor([weight.abs().max().item() / (6 * 448)])
        factor = factor if modelopt else 1 / factor
        packed, scales, values = nvfp4_parts(weight, factor.item() if modelopt else 1 / factor.item())
        wide = scales.float() * factor if modelopt else scales.float() / factor
        names = ("weight", "weight_scale", "weight_scale_2")
        names = names if modelopt else ("weight_packed", "weight_scale", "weight_global_scale")
        parts = dict(zip(names, (packed, scales, factor), strict=True))
        parts["input_scale" if modelopt else "input_global_scale"] = torch.ones(1)
        return {f"{layer}.{part}": t for part, t in parts.items()}, values * wide.repeat_interleave(16, 1)

    stored, weights = quantize_linears(make, torch.bfloat16)
    write(
        path,
        stored,
        {"quant_method": "modelopt", "quant_algo": "NVFP4"} if modelopt else compressed("nvfp4", 16),
        torch.bfloat16,
    )
    return Made(path, weights)


def compressed(kind: str, group: int | None, bits: int = 4) -> dict:
    """compressed-tensors' quantization_config."""
    form = f"{kind}-pack-quantized".removeprefix("int-")
    number = {"num_bits": bits, "type": "int" if kind == "int" else "float", "symmetric": True, "group_size": group}
    inputs = {"num_bits": 4, "type": "float", "dynamic": "local"} if kind == "nvfp4" else None
    groups = {"group_0": {"targets": ["Linear"], "weights": number, "input_activations": inputs, "format": form}}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}
    return config | {"quantization_status": "compressed", "kv_cache_scheme": None}


def make_mxfp4(path: Path, blocks: bool = False) -> Made:
    """compressed-tensors' layout, or, with ``blocks``, gpt-oss's."""

    def make(layer, weight):
        packed, scales, exact = mxfp4_parts(weight)
        if blocks:
            parts = {"weight_blocks": packed.view(len(packed), -1, 16), "weight_scales": scales}
        else:
            parts = {"weight_packed": packed, "weight_scale": scales}
        return {f"{layer}.{part}": t for part, t in parts.items()}, exact

    stored, weights = quantize_linears(make, torch.bfloat16)
    write(path, stored, {"quant_method": "mxfp4"} if blocks else compressed("mxfp4", 32), torch.bfloat16)
    return Made(path, weights)


def integer_parts(weight: torch.Tensor, bits: int, group: int, dtype=torch.bfloat16, zeros=False, order=False):
    """(tensors of a pack-quantized layer, exact weight), packed by compressed-tensors.

    zeros: with zero points; order: inputs are dealt to the groups in turn, as no activations would order them.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half, (n, k) = 2 ** (bits - 1), weight.shape
    index = torch.arange(k) % (k // group) if order else torch.arange(k) // group
    groups = weight[:, index.argsort(stable=True)].view(n, -1, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1) if zeros else groups.abs().amax(-1) / (half - 0.5)).to(dtype)
    points = (-half - low / scales.float()).round().clamp(-half, half - 1) if zeros else torch.zeros(scales.shape)
    wide, point = scales.float()[:, index], points[:, index]
    values = (weight / wide + point).round().clamp(-half, half - 1)
    parts = {"weight_packed": pack_to_int32(values.to(torch.int8), bits), "weight_scale": scales}
    parts["weight_shape"] = torch.tensor(weight.shape)
    if zeros:
        parts["weight_zero_point"] = pack_to_int32(points.to(torch.int8), bits, packed_dim=0)
    if order:
        parts["weight_g_idx"] = index.to(torch.int32)
    return parts, (values - point) * wide


def make_pack_quantized(path: Path, bits: int = 4, group: int = 128, zeros: bool = False) -> Made:
    def make(layer, weight):
        parts, exact = integer_parts(weight, bits, group, zeros=zeros)
        return {f"{layer}.{part}": t for part, t in parts.items()}, exact

    stored, weights = quantize_linears(make, torch.bfloat16)
    write(path, stored, compressed("int", group, bits), torch.bfloat16)
    return Made(path, weights)


def pack_bitnet(values: torch.Tensor) -> torch.Tensor:
    """-1, 0, 1 ``[N, K]`` to uint8 ``[N/4, K]``: the i-th quarter of the rows in bits 2i, plus one."""
    quarters = (values + 1).to(torch.uint8).chunk(4)
    return sum(part << 2 * i for i, part in enumerate(quarters))


def make_bitnet(path: Path, mode: str = "packed", sub_norms: bool = False) -> Made:
    """``mode``: "packed" (bitlinear: the scale divides), "unpacked" (autobitlinear: it multiplies) or "online".

    ``sub_norms``: BitNet b1.58 2B4T's architecture, with a norm before o_proj and down_proj and squared ReLUs.
    """

    def make(layer, weight):
        weight = weight.bfloat16()
        mean = weight.float().abs().mean()
        scale = 1 / mean
        values = (weight.float() * scale).round().clamp(-1, 1)
        if mode == "online":
            return {f"{layer}.weight": weight}, values * (1 / scale).bfloat16().float()
        stored = (scale if mode == "packed" else mean).bfloat16().view(1)
        parts = {"weight": pack_bitnet(values) if mode == "packed" else values.bfloat16(), "weight_scale": stored}
        factor = 1 / stored.float() if mode == "packed" else stored.float()
        return {f"{layer}.{part}": t for part, t in parts.items()}, values * factor

    stored, weights = quantize_linears(make, torch.bfloat16)
    settings = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    if mode != "packed":
        quantization = "online" if mode == "online" else "offline"
        settings |= {"linear_class": "autobitlinear", "quantization_mode": quantization}
    if sub_norms:
        for i in range(LAYERS):
            for part, size in (("self_attn.attn_sub_norm", HIDDEN), ("mlp.ffn_sub_norm", INTERMEDIATE)):
                name = f"model.layers.{i}.{part}.weight"
                stored[name] = torch.linspace(0.5, 1.5, size).bfloat16()
                weights[name] = stored[name].float()
    write(path, stored, settings, torch.bfloat16)
    if not sub_norms:
        return Made(path, weights)
    architecture = {"architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "hidden_act": "relu2"}
    # As published: the files are not needed, transformers has the classes.
    files = {"AutoConfig": "configuration_bitnet.BitNetConfig"}
    files["AutoModelForCausalLM"] = "modeling_bitnet.BitNetForCausalLM"
    config = json.loads((path / "config.json").read_text()) | architecture | {"auto_map": files}
    (path / "config.json").write_text(json.dumps(config))
    return Made(path, weights, architecture)
