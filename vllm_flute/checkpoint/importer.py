"""Import a quantized checkpoint of another format as lut-v1, as a stream."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from .. import __version__
from ..errors import FluteError
from ..format import EXTENSIONS, LutTensor
from .config import HEAD, LayerSpec, LutConfig, check_fused, check_pattern, first_match, fused_with, matches
from .output import Output
from .rewrite import Progress, rewrite
from .sources import Source, open_source
from .sources.base import plain_linears

_CARD = """\
# Imported lookup-table checkpoint

Written by `vllm-flute import` from a checkpoint in the format {kind}: {layers} layers as codes, tables and scales
(lut-v1), {exact} of them equal to the source bit by bit.

Serve it from this directory with vLLM and the vllm-flute plugin installed:

    vllm serve . --quantization flute
"""


@dataclass(frozen=True)
class ImportedLayer:
    """One layer of the output; see `sources.base.Converted` for ``exact`` and ``note``; ``bits`` 0: it became plain."""

    name: str
    n: int
    k: int
    bits: int
    group_size: int
    nbytes: int
    exact: bool
    note: str
    extensions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ImportReport:
    """What `import_checkpoint` did; sizes in bytes."""

    kind: str
    config: LutConfig
    layers: list[ImportedLayer]
    notes: list[str]
    source_bytes: int
    output_bytes: int


def _common(names: list[str], quantized: Sequence[str]) -> list[str]:
    """``ignore`` entries that name exactly ``names``: a last component where no quantized layer has it."""
    taken = {name.rpartition(".")[2] for name in quantized}
    entries = [name if name.rpartition(".")[2] in taken else name.rpartition(".")[2] for name in names]
    return list(dict.fromkeys(entries))


def _plan(source: Source, ignore: Sequence[str]) -> LutConfig:
    """Decide every linear layer; those that ``ignore`` names become plain."""
    specs: dict[str, LayerSpec | None] = {}
    for name, spec in source.quantized().items():
        specs[name] = None if first_match(ignore, name) else spec
    for entry in ignore:
        if not any(matches(check_pattern(entry), name) for name in specs):
            raise FluteError(f"--ignore {entry!r} names no quantized layer of {source.path}")
    quantized = {name: spec for name, spec in specs.items() if spec}
    if not quantized:
        raise FluteError(f"{source.path}: no layer is left to import as lut-v1")
    plain = dict.fromkeys(plain_linears(source)) | {name: None for name in specs if name not in quantized}
    check_fused(quantized | plain)
    default = Counter(quantized.values()).most_common(1)[0][0]
    ignored = _common([*plain], [*quantized])
    if HEAD not in quantized and HEAD not in ignored:
        ignored.append(HEAD)
    overrides = {name: spec for name, spec in quantized.items() if spec != default}
    return LutConfig(*default, source.kind, tuple(ignored), overrides)


def _parts(layer: str, t: LutTensor, spec: LayerSpec) -> dict[str, torch.Tensor]:
    if (t.bits, t.group_size) != tuple(spec):
        raise FluteError(f"{layer} became {t.bits} bits in groups of {t.group_size}, not {spec}: a bug of its reader")
    return t.parts()


def import_checkpoint(
    src: str | Path,
    out: str | Path,
    ignore: Sequence[str] = (),
    allow_lossy: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Write a lut-v1 copy of a quantized checkpoint without quantizing again; after an interruption it continues.

    One decoder layer's results and one source tensor are in memory. A source that turns out to be broken leaves no
    output behind.

    Args:
        src: a directory, hub id or file of a format that `sources.open_source` knows.
        out: the directory to write.
        ignore: modules (see `config.matches`) to write as plain weights, rounded to the model's dtype.
        allow_lossy: quantize again what no table fits.
        overwrite: replace another result of this tool in ``out``.
        progress: called as ``progress(done, total, label)`` after each output shard.

    Raises:
        FluteError: a format that is not known, a broken source, layers that lut-v1 cannot hold, an ``out`` that holds
            something else.
    """
    source = open_source(src)
    if Path(out).resolve() == source.path.resolve():
        raise FluteError(f"{out} is the source itself: choose another output directory")
    config = source.config()
    lut = _plan(source, list(ignore))
    quantized = source.quantized()
    lossy = {layer: what for layer, what in source.lossy.items() if not lut.is_ignored(layer)}
    if lossy and not allow_lossy:
        kinds = ", ".join(sorted(set(lossy.values())))
        raise FluteError(
            f"{source.path}: {len(lossy)} linear layers ({next(iter(lossy))} and others) are {kinds}, which no table "
            "times a scale can say: give --allow-lossy to quantize them again, or --ignore NAME to keep them plain"
        )
    name = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
    dtype = getattr(torch, str(name), None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise FluteError(f"{source.path}: the model's dtype is {name!r}, expected bfloat16, float16 or float32")

    as_plain = f"as plain {name}"
    orders: dict[str, torch.Tensor | None] = {}

    def check_order(layer: str, perm: torch.Tensor | None) -> None:
        """vLLM reads the inputs of a fused layer in one order."""
        orders[layer] = perm
        for other in fused_with(layer):
            same = orders.get(other, perm)
            if (same is None) != (perm is None) or (perm is not None and not torch.equal(same, perm)):
                raise FluteError(
                    f"{layer} and {other} are one layer in vLLM, but act-order sorts their inputs differently: "
                    "quantize the source without act-order"
                )

    def convert(unit: str) -> tuple[dict[str, torch.Tensor], dict | None]:
        layer = unit.removesuffix(".weight")
        if layer not in quantized:
            return {unit: source.tensor(unit)}, None
        if lut.is_ignored(layer):
            weight = source.plain(layer, dtype)
            return {unit: weight}, asdict(ImportedLayer(layer, *weight.shape, 0, 0, weight.nbytes, False, as_plain))
        made = source.convert(layer)
        check_order(layer, made.lut.perm)
        report = ImportedLayer(layer, *made.lut.shape, *quantized[layer], made.lut.nbytes, made.exact, made.note)
        parts = _parts(layer, made.lut, lut.layer(layer))
        used = [part for part in EXTENSIONS if part in parts]
        stored = {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        return stored, asdict(replace(report, extensions=used))

    stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in source.files}
    options = {"version": __version__, "import": source.kind, "config": lut.to_dict(), "lossy": allow_lossy}
    with Output(out, {"source": stats, "options": options}, overwrite) as output:
        try:
            layers = [ImportedLayer(**r) for r in rewrite(source.tensors(), convert, output, progress)]
            used = {part for layer in layers for part in layer.extensions}
            lut = replace(lut, extensions=tuple(part for part in EXTENSIONS if part in used))
            report = ImportReport(source.kind, lut, layers, source.notes, source.nbytes, output.nbytes)
            source.extra_files(output.path)
        except FluteError:
            output.discard()
            raise
        exact = sum(layer.exact for layer in layers)
        card = _CARD.format(kind=source.kind, layers=len(layers), exact=exact)
        output.finish(config | {"quantization_config": lut.to_dict()}, card)
    return report
