"""What `vllm-flute inspect` tells of a checkpoint, in lut-v1 or in a format that can be imported."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from .. import dispatch
from ..format import EXTENSIONS, FORMAT, QUANT_METHOD
from ..layout import Layout
from .config import LutConfig
from .reader import CONFIG, Checkpoint, read_json, resolve
from .sources import open_source
from .validate import check_layers

TOKENS = (1, 8, 64, 512)  # in a call: a stream, some streams, many, a prompt


class _Layer(NamedTuple):
    """One or ``count`` like it."""

    n: int
    k: int
    bits: int
    group_size: int
    scales: str
    nbytes: int
    table: tuple[float, ...]
    extensions: tuple[str, ...]
    exact: bool | None = None
    note: str = ""
    count: int = 1


def kernels_by_tokens(
    codebooks: torch.Tensor, group_size: int, n: int, k: int, device: str, dtype: torch.dtype
) -> dict[str, str]:
    """By tokens in a call, the kernel that a layer ``[n, k]`` with these tables fp32 ``[S, 2**bits]`` runs here."""
    layout = dispatch.backend(device)[0].layout(codebooks, group_size == k)
    header = Layout(layout, codebooks.shape[1].bit_length() - 1, group_size, k, torch.bfloat16, (n,)).header()
    return {str(m): dispatch.choose(header, m, dtype, device) for m in TOKENS}


def _groups(layers: Iterable[_Layer], codebook: str) -> list[dict]:
    """Rows of layers that are alike, with all their tables and what the largest of them would run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[tuple, list[_Layer]] = defaultdict(list)
    for layer in layers:
        found[layer.bits, layer.group_size, layer.scales, layer.extensions, layer.exact, layer.note].append(layer)
    rows = []
    for (bits, group_size, scales, extensions, exact, note), members in sorted(found.items()):
        largest = max(members, key=lambda layer: layer.n * layer.k)
        table = torch.tensor([largest.table])
        kernels = kernels_by_tokens(table, group_size, largest.n, largest.k, device, torch.bfloat16)
        row = {"bits": bits, "group_size": group_size, "codebook": codebook, "scales": scales}
        row |= {"layers": sum(layer.count for layer in members)}
        row |= {"weights": sum(layer.count * layer.n * layer.k for layer in members)}
        row |= {"bytes": sum(layer.count * layer.nbytes for layer in members)}
        row |= {"extensions": list(extensions), "tables": [list(t) for t in sorted({layer.table for layer in members})]}
        row |= {"kernels": kernels, "device": device}
        if exact is not None:
            row |= {"exact": exact, "note": note}
        rows.append(row)
    return rows


def _summary(path: Path, kind: str, rows: list[dict], source_bytes: int) -> dict:
    quantized, weights = sum(row["bytes"] for row in rows), sum(row["weights"] for row in rows)
    return {
        "path": str(path),
        "format": kind,
        "groups": rows,
        "quantized_bytes": quantized,
        "bits_per_weight": quantized * 8 / weights,
        "bytes": source_bytes,
    }


def _lut(source: Checkpoint) -> dict:
    layers = check_layers(source)
    config = LutConfig.from_dict(source.config["quantization_config"])
    found = []
    for layer in layers:
        table = tuple(source.tensor(f"{layer.name}.codebook").tolist())
        extensions = tuple(part for part in EXTENSIONS if f"{layer.name}.{part}" in source.headers)
        settings = (layer.bits, layer.group_size, layer.scale_dtype, layer.nbytes)
        found.append(_Layer(layer.n, layer.k, *settings, table, extensions))
    made = _summary(source.path, FORMAT, _groups(found, config.codebook), source.nbytes)
    other = source.nbytes - made["quantized_bytes"]
    return made | {"ignore": list(config.ignore), "other_bytes": other, "files": len(source.files)}


def _foreign(path: str | Path) -> dict:
    """One layer of each name within a block is converted, and stands for all that have its settings."""
    source = open_source(path)
    alike = Counter((name.rpartition(".")[2], spec) for name, spec in source.quantized().items())
    found = {}
    for name, spec in source.quantized().items():
        key = name.rpartition(".")[2], spec
        if key not in found:
            made = source.convert(name)
            t = made.lut
            scales = {torch.bfloat16: "BF16", torch.float16: "F16"}[t.scales.dtype]
            parts = t.parts()
            extensions = tuple(part for part in EXTENSIONS if part in parts)
            shape = (*t.shape, *spec, scales, t.nbytes, tuple(t.codebook.tolist()), extensions)
            found[key] = _Layer(*shape, made.exact, made.note, alike[key])
    made = _summary(source.path, source.kind, _groups(found.values(), source.kind), source.nbytes)
    return made | {"notes": source.notes, "files": len(source.files)}


def summarize(path: str | Path) -> dict:
    """Settings, sizes in bytes, tables and kernels of a checkpoint, JSON; a lut-v1 one is checked by its headers.

    Of a source in another format the figures are those of the lut-v1 that `import_checkpoint` would write of it.

    Raises:
        FluteError: a broken checkpoint, or one that is neither.
    """
    if not Path(path).is_file() and _is_lut(resolve(path)):
        return _lut(Checkpoint(path))
    return _foreign(path)


def _is_lut(folder: Path) -> bool:
    found = read_json(folder / CONFIG).get("quantization_config") if (folder / CONFIG).exists() else None
    return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD and "num_bits" not in found
