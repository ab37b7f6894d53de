"""Small whole checkpoints in other tools' formats: a LLaMA of two layers, with what the source's weights are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from checkpoints import llama_config, llama_tensors, save_sharded, save_tokenizer

from vllm_flute.checkpoint.sources import upstream_flute
from vllm_flute.codebook import normal_float

HIDDEN, INTERMEDIATE, LAYERS = 256, 512, 2


class Made(NamedTuple):
    """A checkpoint and, in float32, all its weights by name as the source's own dequantization gives them.

    ``architecture``: what its config.json has that a LLaMA's has not.
    """

    path: Path
    weights: dict[str, torch.Tensor]
    architecture: dict = {}


def write(path: Path, tensors: dict[str, torch.Tensor], quantization_config: dict | None, dtype=torch.float16) -> None:
    """Shards, index, tokenizer and config.json; ``quantization_config`` None leaves that key out."""
    path.mkdir(parents=True, exist_ok=True)
    save_sharded(path, {name: t.contiguous() for name, t in tensors.items()}, shards=2)
    config = llama_config(HIDDEN, INTERMEDIATE, LAYERS, dtype)
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    (path / "config.json").write_text(json.dumps(config, indent=2))
    save_tokenizer(path)


def quantize_linears(make: Callable[[str, torch.Tensor], tuple[dict, torch.Tensor]], dtype=torch.float16):
    """(stored tensors, float32 weights): ``make(layer, weight)`` for every linear of a decoder block, the rest plain.

    ``make`` returns the tensors that are stored, by full name, and what they stand for in float32.
    """
    stored, weights = {}, {}
    for name, tensor in llama_tensors(HIDDEN, INTERMEDIATE, LAYERS, dtype).items():
        if name.endswith("_proj.weight"):
            parts, weights[name] = make(name.removesuffix(".weight"), tensor.float())
            stored |= parts
        else:
            stored[name], weights[name] = tensor, tensor.float()
    return stored, weights


def round_to_table(weight: torch.Tensor, table: torch.Tensor, group: int, dtype: torch.dtype):
    """(codes uint8 [N, K], scales [N, G]): absmax scales, nearest value of the table."""
    groups = weight.view(weight.shape[0], -1, group)
    scales = (groups.abs().amax(-1) / table.abs().max()).to(dtype)
    distance = (groups / scales.float()[..., None])[..., None] - table
    return distance.abs().argmin(-1).to(torch.uint8).view_as(weight), scales


def pack_upstream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Upstream FLUTE's int16 ``[N/16*bits, K]`` of codes uint8 ``[N, K]``, written from the layout's description."""
    n, k = codes.shape
    blocks = n // upstream_flute.ROWS[bits]
    even, odd = codes.to(torch.int32).view(blocks, -1, 32, k // 2, 2).unbind(-1)
    pairs = odd | even << bits  # [blocks, sub-blocks, 32, K/2]
    width = 2 * bits
    if bits != 3:
        half = pairs.shape[1] // 2
        words = [sum(pairs[:, w * half + i] << i * width for i in range(half)) for w in (0, 1)]
        packed = torch.stack(words, -1).view(blocks * 32, k)
    else:
        slices = []
        for s in range(3):
            stream = sum(pairs[:, s + 3 * i] << i * width for i in range(5))
            high = stream >> 16 | (pairs[:, 15] >> 2 * s & 3) << 14
            slices.append(torch.stack([stream & 0xFFFF, high], -1).view(blocks, 32, k))
        packed = torch.cat([slices[0].reshape(-1, k), torch.stack(slices[1:], 1).reshape(-1, k)])
    return torch.where(packed >= 1 << 15, packed - (1 << 16), packed).to(torch.int16)


def make_upstream_flute(path: Path, group: int = 64, older: bool = False) -> Made:
    """Upstream FLUTE, 4 bits (2 and 3 want wider layers); ``older``: the settings in flute_config.json."""
    bits = 4
    table = normal_float(bits).half()
    settings = {"num_bits": bits, "group_size": group, "num_sms_packed": 108, "example_batch_size": 1}

    def make(layer, weight):
        codes, scales = round_to_table(weight, table.float(), group, torch.float16)
        pairs = torch.cartesian_prod(table, table).view(torch.float32).view(2**bits, 2**bits, 1)
        parts = {"weight": pack_upstream(codes, bits), "scales": scales, "tables": table.clone(), "tables2": pairs}
        exact = table.float()[codes.int()] * scales.float().repeat_interleave(group, 1)
        return {f"{layer}.{part}": t for part, t in parts.items()}, exact

    stored, weights = quantize_linears(make)
    new = {"quant_method": "flute", "modules_to_not_convert": ["lm_head"], **settings}
    write(path, stored, None if older else new)
    if older:
        (path / "flute_config.json").write_text(json.dumps(settings))
    return Made(path, weights)


def pack_gptq(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """GPTQ's int32 words ``[R*bits/32, C]`` of codes ``[R, C]``; 3 bits in its pattern 10, 1, 10, 1, 10 of 32 codes."""
    codes = codes.to(torch.int64)
    if bits != 3:
        parts = codes.view(-1, 32 // bits, codes.shape[1])
        words = sum(parts[:, i] << bits * i for i in range(32 // bits))
    else:
        c = codes.view(-1, 32, codes.shape[1]).unbind(1)
        first = sum(c[i] << 3 * i for i in range(10)) | (c[10] & 3) << 30
        second = c[10] >> 2 | sum(c[11 + i] << 3 * i + 1 for i in range(10)) | (c[21] & 1) << 31
        third = c[21] >> 1 | sum(c[22 + i] << 3 * i + 2 for i in range(10))
        words = torch.stack([first, second, third], 1).flatten(0, 1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """AWQ's int32 words ``[R, C/8]`` of codes ``[R, C]``."""
    parts = codes.to(torch.int64).view(codes.shape[0], -1, 8)
    words = sum(parts[..., output] << 4 * i for i, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def round_affine(weight: torch.Tensor, bits: int, group: int, symmetric: bool):
    """(codes uint8 [N, K], fp16 scales [N, G], zero points int64 [N, G]) with ``W ~ scale * (code - zero)``."""
    groups = weight.view(weight.shape[0], -1, group)
    top = 2**bits - 1
    if symmetric:
        scales = (groups.abs().amax(-1) / 2 ** (bits - 1)).half()
        zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.int64)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / top).half()
        zeros = (-low / scales.float()).round().clamp(0, top).to(torch.int64)
    codes = (groups / scales.float()[..., None]).round() + zeros[..., None]
    return codes.clamp(0, top).to(torch.uint8).view_as(weight), scales, zeros


def affine_weight(codes, scales, zeros, g_idx=None) -> torch.Tensor:
    """``scale * (code - zero)`` in float32, the group of column k being ``g_idx[k]``."""
    if g_idx is None:
        g_idx = torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
    return scales.float()[:, g_idx] * (codes.to(torch.int64) - zeros[:, g_idx]).float()


def make_gptq(
    path: Path, bits: int = 4, group: int = 64, symmetric=True, v2=False, act_order=False, settings: dict | None = None
) -> Made:
    """GPTQ; ``act_order``: g_idx from a random order of each layer's inputs, one for q, k, v and one for gate, up."""

    def make(layer, weight):
        n, k = weight.shape
        # The layers with one input have one order: a number from its block and what reads it.
        order = torch.arange(k)
        if act_order:
            where = layer.split(".")[2] + ("o" if "o_proj" in layer else "a" if "attn" in layer else "m") + str(k)
            order = torch.randperm(k, generator=torch.Generator().manual_seed(sum(map(ord, where))))
        g_idx = torch.empty(k, dtype=torch.int32)
        g_idx[order] = torch.arange(k, dtype=torch.int32) // group
        codes_in_order, scales, zeros = round_affine(weight[:, order], bits, group, symmetric)
        codes = torch.empty_like(codes_in_order)
        codes[:, order] = codes_in_order
        stored = zeros if v2 else (zeros - 1) % 2**bits
        parts = {"qweight": pack_gptq(codes.T, bits), "qzeros": pack_gptq(stored, bits).T, "scales": scales.T}
        parts["g_idx"] = g_idx
        return {f"{layer}.{part}": t for part, t in parts.items()}, affine_weight(codes, scales, zeros, g_idx.long())

    found = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": act_order}
    found["checkpoint_format"] = "gptq_v2" if v2 else "gptq"
    stored, weights = quantize_linears(make)
    write(path, stored, settings or found)
    return Made(path, weights)


def make_awq(path: Path, group: int = 64) -> Made:
    def make(layer, weight):
        codes, scales, zeros = round_affine(weight, 4, group, symmetric=False)
        parts = {"qweight": pack_awq(codes.T), "qzeros": pack_awq(zeros.T), "scales": scales.T}
        return {f"{layer}.{part}": t for part, t in parts.items()}, affine_weight(codes, scales, zeros)

    stored, weights = quantize_linears(make)
    write(path, stored, {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"})
    return Made(path, weights)
