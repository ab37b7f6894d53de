"""Check a lut-v1 checkpoint by its headers: seconds for the largest, before a server loads a byte of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import FluteError
from ..format import EXTENSIONS, PARTS
from .config import HEAD, LINEAR, LayerSpec, LutConfig, check_fused, fused_with
from .reader import CONFIG, Checkpoint, Header
from .rewrite import LAYER

_SCALE_DTYPES = ("BF16", "F16")
_OFFSET_DTYPES = ("F32", *_SCALE_DTYPES)


@dataclass(frozen=True)
class LayerInfo:
    """One quantized layer ``[n, k]`` as it is stored; ``scale_dtype`` is BF16 or F16, ``nbytes`` of its tensors."""

    name: str
    n: int
    k: int
    bits: int
    group_size: int
    scale_dtype: str
    nbytes: int


def _found(h: Header) -> str:
    return f"{h.dtype} {list(h.shape)} in {h.file}"


def _layer(name: str, parts: Mapping[str, Header], spec: LayerSpec) -> LayerInfo:
    """Compare one layer's headers with its spec."""
    qweight, scales, codebook = (parts[part] for part in PARTS)
    bits, group = spec

    def refuse(part: str, header: Header, expected: str):
        raise FluteError(f"{name}.{part} is {_found(header)}, expected {expected} ({spec}): quantize again")

    if codebook.dtype != "F32" or codebook.shape != (2**bits,):
        refuse("codebook", codebook, f"F32 [{2**bits}]")
    if qweight.dtype != "U8" or len(qweight.shape) != 2 or qweight.shape[1] % bits or 0 in qweight.shape:
        refuse("qweight", qweight, f"U8 [N, K*{bits}/8]")
    n, k = qweight.shape[0], qweight.shape[1] * 8 // bits
    if k % group:
        refuse("qweight", qweight, f"a K that is a multiple of the group size, not {k}")
    if scales.dtype not in _SCALE_DTYPES or scales.shape != (n, k // group):
        refuse("scales", scales, f"BF16 or F16 [{n}, {k // group}]")
    if (offsets := parts.get("offsets")) and (offsets.dtype not in _OFFSET_DTYPES or offsets.shape != scales.shape):
        refuse("offsets", offsets, f"F32, BF16 or F16 {list(scales.shape)}")
    if (perm := parts.get("perm")) and (perm.dtype != "I32" or perm.shape != (k,)):
        refuse("perm", perm, f"I32 [{k}]")
    nbytes = sum(header.nbytes for header in parts.values())
    return LayerInfo(name, n, k, bits, group, scales.dtype, nbytes)


def _check_linear(source: Checkpoint, config: LutConfig, layers: Mapping[str, LayerInfo]) -> None:
    """Raise FluteError where what config.json says of a linear layer is not what is stored."""
    for name in layers:
        if config.is_ignored(name):
            raise FluteError(f"{name} is quantized, but config.json's ignore names it: remove one of the two")
    for name in config.overrides:
        if name not in layers:
            raise FluteError(f"config.json's overrides name {name}, which is not a quantized layer of {source.path}")
    plain = [name.removesuffix(".weight") for name in source.headers if LINEAR.fullmatch(name)]
    if f"{HEAD}.weight" in source.headers:
        plain.append(HEAD)
    for name in plain:
        if not config.is_ignored(name):
            header = source.headers[f"{name}.weight"]
            raise FluteError(
                f"{name}.weight is {_found(header)}, but config.json says that the layer is quantized: "
                "quantize again, or add the layer to ignore"
            )
    if HEAD in layers and source.tied_head:
        raise FluteError(
            f"{HEAD} is quantized, but {source.path / 'config.json'} has tie_word_embeddings true, with which it is "
            "never used: write false there"
        )
    if source.tied_head and not config.is_ignored(HEAD):
        raise FluteError(f"the output head is tied to the embedding, so config.json's ignore must name {HEAD!r}")
    specs = {name: LayerSpec(info.bits, info.group_size) for name, info in layers.items()}
    check_fused(specs | dict.fromkeys(plain))


def _check_sizes(source: Checkpoint, quantized: Mapping[str, LayerInfo]) -> None:
    """Raise FluteError where config.json has other sizes than the tensors: a server allocates by config.json."""
    layers = {int(found[1]) for name in source.headers if (found := LAYER.search(name))}
    stored = {"num_hidden_layers": max(layers) + 1} if layers else {}
    embedding = source.headers.get("model.embed_tokens.weight")
    if embedding and len(embedding.shape) == 2:
        stored |= dict(zip(("vocab_size", "hidden_size"), embedding.shape, strict=True))
    stored |= [("intermediate_size", info.k) for name, info in quantized.items() if name.endswith(".mlp.down_proj")]
    for key, size in stored.items():
        said = source.config.get(key, size)
        if said != size:
            raise FluteError(
                f"{source.path / CONFIG} says {key} {said!r}, but the tensors have {size}: fetch or write both again"
            )


def _check_perms(source: Checkpoint, found: Mapping[str, Mapping[str, Header]]) -> None:
    """Raise FluteError for what is no permutation, and where matrices that vLLM fuses read their inputs differently."""
    perms = {name: source.tensor(f"{name}.perm") for name, parts in found.items() if "perm" in parts}
    for name, perm in perms.items():
        if not torch.equal(perm.sort().values, torch.arange(perm.numel(), dtype=torch.int32)):
            raise FluteError(f"{name}.perm is no permutation of 0 to {perm.numel() - 1}: import the source again")
    for name, perm in perms.items():
        for other in fused_with(name):
            if other in found and (other not in perms or not torch.equal(perm, perms[other])):
                raise FluteError(
                    f"vLLM fuses {name} and {other} into one layer, but their inputs are in different orders (perm): "
                    "quantize the source again with one order for both, or without act-order"
                )


def check_layers(source: Checkpoint) -> list[LayerInfo]:
    """`check_checkpoint` for an opened checkpoint."""
    if "quantization_config" not in source.config:
        raise FluteError(
            f"{source.path} is not LUT-quantized (config.json has no quantization_config): "
            "run 'vllm-flute quantize' on it"
        )
    try:
        config = LutConfig.from_dict(source.config["quantization_config"])
    except FluteError as e:
        raise FluteError(f"{source.path / 'config.json'}: {e}") from None
    found: dict[str, dict[str, Header]] = {}
    for key, header in source.headers.items():
        name, _, part = key.rpartition(".")
        if part in (*PARTS, *EXTENSIONS):
            found.setdefault(name, {})[part] = header
    if not found:
        raise FluteError(f"{source.path} has no quantized layer, although its config.json says so: quantize again")
    found = {name: parts for name, parts in found.items() if not parts.keys() <= {*EXTENSIONS}}
    for name, parts in found.items():
        if unlisted := [part for part in EXTENSIONS if part in parts and part not in config.extensions]:
            raise FluteError(
                f"{source.path / 'config.json'}: quantization_config's extensions must list {unlisted[0]!r}, which "
                f"{name} has"
            )
        if missing := [part for part in PARTS if part not in parts]:
            present = next(iter(parts))
            raise FluteError(f"{name}.{missing[0]} is missing from {source.path}, which has {present}: quantize again")
        if f"{name}.weight" in source.headers:
            raise FluteError(f"{source.path} has both {name}.weight and {name}.qweight: remove one of the two")
    layers = {name: _layer(name, parts, config.layer(name)) for name, parts in found.items()}
    _check_perms(source, found)
    _check_sizes(source, layers)
    _check_linear(source, config, layers)
    for name in layers:
        if not torch.isfinite(source.tensor(f"{name}.codebook")).all():
            raise FluteError(f"{name}.codebook has values that are not finite: quantize again")
    return list(layers.values())


def check_checkpoint(path: str | Path) -> list[LayerInfo]:
    """Check everything about a lut-v1 directory that needs no weights; returns its quantized layers.

    Reads config.json, the index, every shard's header and the codebooks.

    Raises:
        FluteError: names the file or tensor, what was found, what was expected and what to do.
    """
    return check_layers(Checkpoint(path))
