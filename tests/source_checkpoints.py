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
    """A checkpoint and, in float32, all its weights by name as the source's own dequantization gives them."""

    path: Path
    weights: dict[str, torch.Tensor]


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


def make_upstream_flute(path: Path, bits: int = 4, group: int = 64, older: bool = False) -> Made:
    """Upstream FLUTE; ``older``: the settings in flute_config.json. N of a layer must be a multiple of 128 to 512."""
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
