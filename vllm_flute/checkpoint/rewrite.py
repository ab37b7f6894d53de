"""The walk that every conversion shares: tensor by tensor, one output shard for each decoder layer."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..errors import FluteError
from .output import Output
from .reader import Checkpoint

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Tensors a name becomes, and what to report about it (JSON), or None.
Convert = Callable[[str], tuple[dict[str, torch.Tensor], dict | None]]
Progress = Callable[[int, int, str], None]


def fingerprint(source: Checkpoint, options: dict) -> dict:
    """What a restart must find unchanged: the source's weight files and config, and the options."""
    stats = {file: (source.path / file).stat() for file in [*source.files, "config.json"]}
    return {"source": {file: [s.st_size, s.st_mtime_ns] for file, s in stats.items()}, "options": options}


def units(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(label, names) of each output shard: the embedding, decoder layers in order, what is left, the head."""
    groups: dict[tuple, list[str]] = {}
    for name in sorted(names):
        layer = LAYER.search(name)
        if layer:
            # Two stacks of layers (an encoder's and a decoder's) stay apart by what comes before.
            key = (1, name[: layer.start()], int(layer[1]), name[: layer.end() - 1].lstrip("."))
        elif "embed_tokens" in name:
            key = (0, "", 0, "embedding")
        elif name.startswith("lm_head."):
            key = (3, "", 0, "lm_head")
        else:
            key = (2, "", 0, "other")
        groups.setdefault(key, []).append(name)
    return [(key[-1], groups[key]) for key in sorted(groups)]


def rewrite(names: Iterable[str], convert: Convert, output: Output, progress: Progress | None) -> list[dict]:
    """Convert every tensor of ``names`` into ``output``'s shards; returns the reports in order.

    Only one unit's results, and one source tensor, are in memory at a time. Shards that an interrupted run
    completed are not computed again. ``progress(done, total, label)`` is called after each shard.
    """
    plan = units(names)
    reports = []
    for i, (label, members) in enumerate(plan):
        shard = f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors"
        if shard not in output.shards:
            tensors, report = {}, []
            for name in members:
                made, info = convert(name)
                tensors |= made
                if info:
                    report.append(info)
            output.write_shard(shard, tensors, report)
        reports += output.shards[shard]["report"]
        if progress:
            progress(i + 1, len(plan), label)
    return reports


def require_plain(source: Checkpoint) -> None:
    """Raise FluteError when the source's weights are not plain floating point."""
    method = source.config.get("quantization_config") or source.config.get("compression_config")
    if method:
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise FluteError(
            f"{source.path} is already quantized (quant_method {name!r}): start from the unquantized checkpoint"
        )


def require_elsewhere(source: Checkpoint, out) -> None:
    """Raise FluteError when the output directory is the source."""
    if Path(out).resolve() == source.path.resolve():
        raise FluteError(f"{out} is the source itself: choose another output directory")
