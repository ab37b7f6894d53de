"""Quantize a checkpoint to lut-v1 as a stream."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import __version__
from ..codebook import BITS, DEFAULT_CODEBOOK, check_bits, make_codebook
from ..errors import FluteError
from ..format import EXTENSIONS, GROUP_SIZES, PARTS, SCALE_DTYPES, LutTensor
from ..quantization import DATA_FREE, FITTED, METHODS, gptq, quantize
from .calibrate import Calibration, calibration_tokens
from .card import model_card
from .config import HEAD, LINEAR, LayerSpec, LutConfig, check_fused, check_pattern, first_match, matches
from .learned import UNLEARNED, learn_scales
from .mixed import mix
from .output import Output, Scratch, copy_files
from .prescale import PrescaledCheckpoint, search_prescales
from .reader import Checkpoint
from .rewrite import LAYER, Convert, Progress, fingerprint, require_elsewhere, require_plain, rewrite
from .rotate import EMBEDDING, RotatedCheckpoint
from .sensitivity import sample_tokens, sensitivities

# Weights compared at once when the error is measured: in cache, and just below what torch would split over threads
# itself (32768 elements), because many small parallel sections crawl on a machine whose cores are busy.
_CHUNK_WEIGHTS = (1 << 15) - 1
# Weights multiplied at once with the second moments, which may be a gigabyte and are read again for each chunk.
_PRODUCT_WEIGHTS = 1 << 23


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer; ``error`` is ``||W - W_quantized|| / ||W||`` (Frobenius).

    With calibration ``output_error`` is ``||X (W - W_quantized)^T|| / ||X W^T||`` over the calibration inputs X, before
    scales are learned; "scale-search" counts the inputs as uncorrelated.
    """

    name: str
    n: int
    k: int
    bits: int
    group_size: int
    adjusted: bool
    nbytes: int
    error: float
    output_error: float | None


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_checkpoint` did; sizes in bytes of tensors, ``calibration_tokens`` 0 without calibration."""

    config: LutConfig
    layers: list[LayerReport]
    source_bytes: int
    output_bytes: int
    method: str
    calibration_tokens: int
    rotated: bool
    prescaled: bool

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of a quantized weight, scales and codebooks included."""
        return sum(r.nbytes for r in self.layers) * 8 / sum(r.n * r.k for r in self.layers)

    @property
    def mean_error(self) -> float:
        return sum(r.error for r in self.layers) / len(self.layers)


def fit_group(requested: int, k: int, name: str) -> int:
    """The group size for a layer of K inputs: the largest supported one up to ``requested`` that divides K."""
    if k % 8:
        raise FluteError(f"{name} has K={k}, which is no multiple of 8 and cannot be packed: give --ignore {name}")
    if requested == 0:
        return k
    return next((g for g in sorted(GROUP_SIZES, reverse=True) if g <= requested and k % g == 0), k)


def _table(codebook: str | torch.Tensor, bits: int) -> list[float] | None:
    """The values of a table that is the same for all layers, or None for one that is fitted to each."""
    if isinstance(codebook, str) and codebook == FITTED:
        check_bits(bits)
        return None
    return make_codebook(codebook, bits).tolist()


def _check_options(bits: int, group_size: int, codebook, scale_dtype: torch.dtype, where: str) -> None:
    try:
        _table(codebook, bits)
    except FluteError as e:
        raise FluteError(f"{where}{e}") from None
    if group_size not in (0, *GROUP_SIZES):
        raise FluteError(
            f"{where}unsupported group size {group_size} (supported: 16, 32, 64, 128, 256, and 0 for a whole row)"
        )
    if scale_dtype not in SCALE_DTYPES:
        raise FluteError(f"scale dtype {scale_dtype} is not supported (supported: bfloat16, float16)")


def _plan(
    shapes: Mapping[str, tuple[int, int]],
    bits,
    group_size,
    codebook: str,
    ignore,
    overrides: Mapping[str, LayerSpec],
    others: list[str],
) -> LutConfig:
    """Decide every linear layer.

    Args:
        shapes: (N, K) by module name.
        others: matrices that are not quantized. A server asks for each that it multiplies by, a router for one.
    """
    for entry in [*ignore, *overrides]:
        if entry != HEAD and not any(matches(check_pattern(entry), name) for name in shapes):
            option = "--ignore" if entry in ignore else "--override"
            raise FluteError(f"{option} {entry!r} names no linear layer (they are called like {next(iter(shapes))!r})")
    specs: dict[str, LayerSpec | None] = {}
    for name, (_, k) in shapes.items():
        if first_match(ignore, name):
            specs[name] = None
        elif entry := first_match(overrides, name):
            spec = overrides[entry]
            group = spec.group_size or k
            if k % group or k % 8:
                raise FluteError(f"--override {entry}: group size {group} does not divide K={k} of {name}")
            specs[name] = LayerSpec(spec.bits, group)
        else:
            specs[name] = LayerSpec(bits, fit_group(group_size, k, name))
    check_fused(specs)
    quantized = {name: spec for name, spec in specs.items() if spec}
    if not quantized:
        raise FluteError("every linear layer is ignored: nothing to quantize")
    # Whole rows have no size in common: the most frequent is the default, the others are overrides.
    common = group_size or Counter(spec.group_size for spec in quantized.values()).most_common(1)[0][0]
    default = LayerSpec(bits, common)
    ignored = [*ignore] if HEAD in shapes or HEAD in ignore else [*ignore, HEAD]
    found = [(LAYER.search(name), name.removesuffix(".weight")) for name in others]
    ignored += dict.fromkeys(name[layer.end() :] for layer, name in found if layer)
    return LutConfig(*default, codebook, tuple(ignored), {n: s for n, s in quantized.items() if s != default})


def dequantized(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The plain weights that stored tensors of lut-v1 stand for; what is not quantized stays."""
    stored: dict[str, dict[str, torch.Tensor]] = {
        n.removesuffix(".qweight"): {} for n in tensors if n.endswith(".qweight")
    }
    plain = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer in stored and part in (*PARTS, *EXTENSIONS):
            stored[layer][part] = tensor
        else:
            plain[name] = tensor
    return plain | {f"{n}.weight": LutTensor.from_parts(parts, n).dequantize() for n, parts in stored.items()}


def _relative_error(weight: torch.Tensor, t: LutTensor) -> float:
    """``||W - W_quantized|| / ||W||``, in row chunks."""
    rows = max(1, _CHUNK_WEIGHTS // weight.shape[1])

    def sums(i: int) -> tuple[float, float]:
        exact = weight[i : i + rows].to(torch.float32)
        part = LutTensor(t.qweight[i : i + rows], t.scales[i : i + rows], t.codebook)
        return (exact - part.dequantize()).square().sum().item(), exact.square().sum().item()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        lost, total = map(sum, zip(*pool.map(sums, range(0, weight.shape[0], rows)), strict=True))
    return (lost / total) ** 0.5 if total else 0.0


def _output_error(weight: torch.Tensor, t: LutTensor, moments: torch.Tensor) -> float:
    """``||X (W - W_quantized)^T|| / ||X W^T||`` for inputs X of second moments ``[K, K]`` or ``[K]``, in row chunks."""

    def size(part: torch.Tensor) -> float:
        return ((part @ moments if moments.dim() == 2 else part * moments) * part).sum().item()

    lost = total = 0.0
    rows = max(1, _PRODUCT_WEIGHTS // weight.shape[1])
    for i in range(0, weight.shape[0], rows):
        exact = weight[i : i + rows].to(torch.float32)
        difference = exact - LutTensor(t.qweight[i : i + rows], t.scales[i : i + rows], t.codebook).dequantize()
        lost += size(difference)
        total += size(exact)
    return (max(lost, 0.0) / total) ** 0.5 if total > 0 else 0.0


def quantize_checkpoint(
    src: str | Path,
    out: str | Path,
    bits: int = 4,
    group_size: int = 64,
    codebook: str | torch.Tensor | None = None,
    ignore: list[str] | tuple[str, ...] = (),
    overrides: Mapping[str, tuple[int, int]] | None = None,
    lm_head: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
    method: str | None = None,
    calibrate: str | Path | None = None,
    tokens: int = 32768,
    rotate: bool = False,
    prescale: bool = False,
    target_bits: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Write a lut-v1 copy of a checkpoint; run again after an interruption, it continues.

    The linear layers of decoder blocks are quantized, everything else is copied bit by bit. Memory holds one
    decoder layer's results and one source tensor.

    Args:
        src: a directory or hub id of an unquantized checkpoint in safetensors.
        out: the directory to write.
        bits: 2, 3 or 4.
        group_size: 16, 32, 64, 128, 256, or 0 for one scale a row. Where it does not divide a layer's K that
            layer takes the largest supported size that does, or K itself, and is listed in the overrides.
        codebook: "fitted" (a table for each layer: the default with calibration), "nf" (the default without),
            "lloyd-max", "fp4", "int", "ternary" or a tensor of at most ``2**bits`` values.
        ignore: module names not to quantize (see `config.matches`).
        overrides: (bits, group_size) by module name, matched like ``ignore``; the first match counts.
        lm_head: quantize the output head too; a tied head is untied and made from the embedding.
        scale_dtype: bf16 or fp16.
        method: "absmax" or "scale-search" (see `quantization.quantize`), or "gptq" (see `quantization.gptq`) or
            "learned" (GPTQ, then `learn_scales`), which need calibration. Default: "gptq" with calibration,
            "scale-search" without.
        calibrate: a UTF-8 text whose first ``tokens`` tokens run through the model; "scale-search" then weights
            errors by the inputs' second moments.
        rotate: fold random rotations into the weights first (see `RotatedCheckpoint`).
        prescale: fold scales of the inputs into the weights first, so that inputs that matter are rounded less (see
            `search_prescales`); needs calibration.
        target_bits: choose the width of each layer for so many bits a weight on average, scales included (see `mix`);
            ``bits`` then counts for the output head only.
        overwrite: replace another result of this tool in ``out``.
        progress: called as ``progress(done, total, label)`` after each output shard.

    Calibration, rotation and the choice of widths know LLaMA's decoder layers and those like them
    (`llama.MODEL_TYPES`); the rest any model whose linear layers are named as transformers names them.

    Raises:
        FluteError: an option or a layer that is impossible, a source that is broken or already quantized, an
            ``out`` that holds something else.
    """
    ignore, overrides = list(ignore), {name: LayerSpec(*spec) for name, spec in (overrides or {}).items()}
    method = method or ("gptq" if calibrate else DATA_FREE)
    codebook = codebook if codebook is not None else FITTED if calibrate else DEFAULT_CODEBOOK
    if method not in METHODS:
        raise FluteError(f"unknown method {method!r} (known: {', '.join(METHODS)})")
    full = method in ("gptq", "learned")
    if (full and not calibrate) or (method == "absmax" and calibrate):
        raise FluteError(f"method {method} {'needs' if full else 'does not use'} calibration text")
    if prescale and not calibrate:
        raise FluteError("--prescale needs calibration text, and a method that uses it: give --calibrate TEXT")
    _check_options(bits, group_size, codebook, scale_dtype, "")
    for name, spec in overrides.items():
        _check_options(*spec, codebook, scale_dtype, f"--override {name}: ")
    if lm_head and HEAD in ignore:
        raise FluteError("--lm-head and --ignore lm_head contradict each other: give one")
    source = RotatedCheckpoint(src) if rotate else Checkpoint(src)
    require_elsewhere(source, out)
    require_plain(source)

    head_from = EMBEDDING if source.tied_head else f"{HEAD}.weight"
    weights = {name: name for name in source.headers if LINEAR.fullmatch(name) and len(source.headers[name].shape) == 2}
    if not weights:
        raise FluteError(
            f"{source.path} has no linear layers called model.layers.N...._proj.weight: nothing to quantize"
        )
    if lm_head:
        if head_from not in source.headers:
            raise FluteError(f"--lm-head: {source.path} has no tensor {head_from}")
        weights[f"{HEAD}.weight"] = head_from
    shapes = {name.removesuffix(".weight"): source.headers[stored].shape for name, stored in weights.items()}
    label = codebook if isinstance(codebook, str) else "custom"
    others = [name for name, header in source.headers.items() if len(header.shape) == 2 and name not in weights]
    lut = _plan(shapes, bits, group_size, label, ignore, overrides, others)
    ids = calibration_tokens(source, calibrate, tokens) if calibrate else None

    def rounded(tensor: torch.Tensor, squares: torch.Tensor, width: int, layer: str) -> torch.Tensor:
        """A weight at another width, without compensation of errors: what widths are compared by."""
        size = lut.layer(layer).group_size
        how = (method, None) if method == "absmax" else ("scale-search", squares if calibrate else None)
        return quantize(tensor, width, size, codebook, scale_dtype, layer, *how).dequantize()

    if target_bits is not None:
        for width in BITS:
            _check_options(width, group_size, codebook, scale_dtype, "--target-bits: ")

        def losses(names: list[str]) -> dict[str, dict[int, float]]:
            return sensitivities(source, sample_tokens(source, ids), names, rounded, progress)

        lut = mix(lut, shapes, target_bits, list(overrides), losses)

    def final(layer: int) -> dict[str, torch.Tensor]:
        """The weights of a decoder layer that is written, dequantized, by their names within it."""
        prefix = f"model.layers.{layer}."
        stored = {name: written.tensor(name) for name in written.names(prefix)}
        return {name.removeprefix(prefix): w for name, w in dequantized(stored).items()}

    output_errors: dict[str, float] = {}

    def quantized(layer: str, tensor: torch.Tensor, moments: torch.Tensor | None) -> LutTensor:
        spec, name = lut.layer(layer), f"{layer}.weight"
        if full:
            t = gptq(tensor, moments, *spec, codebook, scale_dtype, name)
        else:
            t = quantize(tensor, *spec, codebook, scale_dtype, name, method, moments)
        if moments is not None:
            output_errors[layer] = _output_error(tensor, t, moments)
        return t

    block: dict[str, LutTensor] = {}  # the rest of the decoder layer that is being written, where it is calibrated

    def calibrated(layer: str, tensor: torch.Tensor) -> LutTensor:
        if layer == HEAD:
            return quantized(layer, tensor, calibration.head_moments())
        if layer not in block:
            index = int(LAYER.search(layer)[1])
            prefix = f"model.layers.{index}."

            def stage(names: tuple[str, ...], moments: torch.Tensor) -> dict[str, LutTensor]:
                return {
                    name: quantized(prefix + name, source.tensor(f"{prefix}{name}.weight"), moments)
                    for name in names
                    if not lut.is_ignored(prefix + name)
                }

            block.update({prefix + name: t for name, t in calibration.quantize(index, stage).items()})
        return block.pop(layer)

    def convert(name: str) -> tuple[dict[str, torch.Tensor], dict | None]:
        layer = name.removesuffix(".weight")
        tensor = source.tensor(weights.get(name, name))
        if name not in weights or lut.is_ignored(layer):
            return {name: tensor}, None
        spec = lut.layer(layer)
        t = calibrated(layer, tensor) if calibration else quantized(layer, tensor, None)
        made = {f"{layer}.qweight": t.qweight, f"{layer}.scales": t.scales, f"{layer}.codebook": t.codebook}
        adjusted = spec.group_size != (group_size or t.shape[1]) and not first_match(overrides, layer)
        errors = _relative_error(tensor, t), output_errors.get(layer)
        report = LayerReport(layer, *t.shape, *spec, adjusted, t.nbytes, *errors)
        return made, asdict(report)

    def learned(reports: list[dict]) -> Convert:
        """The second walk: what the first one wrote, with learned scales."""
        scales = learn_scales(source, written, ids, progress)
        by_layer = {r["name"]: r for r in reports}

        def convert(name: str) -> tuple[dict[str, torch.Tensor], dict | None]:
            layer = name.removesuffix(".weight")
            if layer not in by_layer:
                return {name: written.tensor(name)}, None
            made = {key: written.tensor(key) for key in (f"{layer}.{part}" for part in PARTS)}
            made |= {f"{layer}.scales": scales[layer]} if layer in scales else {}
            error = _relative_error(source.tensor(weights[name]), LutTensor(*made.values()))
            return made, by_layer[layer] | {"error": error}

        return convert

    table = _table(codebook, bits)
    options = {"version": __version__, "config": lut.to_dict(), "table": table, "scale_dtype": str(scale_dtype)}
    options |= {"method": method, "rotate": rotate, "prescale": prescale}
    calibration = None
    if calibrate:
        options["calibration"] = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    with Output(out, fingerprint(source, options), overwrite) as output, ExitStack() as stack:
        written = output
        if method == "learned":
            # What GPTQ makes lies in a folder of its own until its scales are learned.
            written = stack.enter_context(Scratch(output.path / UNLEARNED, output.fingerprint))
        if prescale:
            # A run that continues finds the scales again. They need not be the same bit by bit: none reaches beyond
            # the decoder layer, and so the shard, that it belongs to.
            source = PrescaledCheckpoint(source, search_prescales(source, ids, lut, codebook, progress))
        if calibrate:
            calibration = Calibration(source, ids, final, full)
        names = dict.fromkeys([*source.headers, *weights])
        reports = rewrite(names, convert, written, progress)
        if method == "learned":
            reports = rewrite(names, learned(reports), output, progress)
        layers = [LayerReport(**r) for r in reports]
        count = ids.numel() if calibrate else 0
        report = QuantizeReport(
            lut, layers, source.nbytes, output.nbytes, method, count, rotated=rotate, prescaled=prescale
        )
        config = source.config | {"quantization_config": lut.to_dict()}
        if lm_head:
            config["tie_word_embeddings"] = False
        copy_files(source.path, output.path)
        output.finish(config, model_card(source, report))
    shutil.rmtree(output.path / UNLEARNED, ignore_errors=True)
    return report
