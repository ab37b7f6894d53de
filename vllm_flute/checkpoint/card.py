"""The README.md of a quantized checkpoint."""

import re
from collections import Counter

from .reader import Checkpoint


def _front_matter(source: Checkpoint) -> dict[str, str]:
    """The source card's one-line entries that matter to a copy: its licence and what it was made from."""
    readme = source.path / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.exists() else ""
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return dict(re.findall(r"^(base_model|license(?:_name|_link)?): *(\S.*)$", head[1] if head else "", re.MULTILINE))


def _base_model(source: Checkpoint) -> str | None:
    """The hub id of the source, where it has one."""
    for name in (
        source.source,
        str(source.config.get("_name_or_path", "")),
        _front_matter(source).get("base_model", ""),
    ):
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
            return name
    return None


def model_card(source: Checkpoint, report) -> str:
    """The card of a `QuantizeReport`: no date and no path, so that the same input gives the same bytes."""
    config, layers = report.config, report.layers
    base = _base_model(source)
    title = (base or source.path.resolve().name).rpartition("/")[2]
    front = _front_matter(source) | {"library_name": "vllm", "pipeline_tag": "text-generation"}
    if base:
        front |= {"base_model": base, "base_model_relation": "quantized"}
    groups = Counter((layer.bits, layer.group_size) for layer in layers)
    rows = [
        ("format", "lut-v1"),
        ("bits", config.bits),
        ("group size", config.group_size),
        ("codebook", config.codebook),
        ("method", report.method),
        ("quantized layers", ", ".join(f"{n} of {b} bits in groups of {g}" for (b, g), n in sorted(groups.items()))),
        ("not quantized", ", ".join(f"`{entry}`" for entry in config.ignore) or "embeddings and norms only"),
        ("bits per quantized weight", f"{report.bits_per_weight:.3f}"),
        ("mean relative error of a layer", f"{report.mean_error:.4f}"),
        ("size", f"{report.output_bytes / 1e6:.1f} MB (source {report.source_bytes / 1e6:.1f} MB)"),
    ]
    tokens = report.calibration_tokens
    calibration = f"calibrated with {tokens} tokens of text" if tokens else "without calibration data"
    calibration += ", rotated" if report.rotated else ""
    calibration += ", prescaled" if report.prescaled else ""
    lines = ["---", *(f"{key}: {value}" for key, value in front.items()), "tags:"]
    lines += ["- quantized", "- lookup-table", "- vllm-flute", "---", f"# {title}, lookup-table quantized", ""]
    lines += [
        f"Made from {f'[{base}](https://huggingface.co/{base})' if base else title} with `vllm-flute quantize`, "
        f"{calibration}: each weight is an entry of a small table times the scale of its group.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "Serve it from this directory with vLLM and the vllm-flute plugin installed:",
        "",
        "    vllm serve . --quantization flute",
        "",
    ]
    return "\n".join(lines)
