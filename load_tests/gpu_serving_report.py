"""The tables and the plot of load_tests/gpu_serving.py, from the JSON of its parts."""

import json
import statistics
from pathlib import Path

import gpu_serving_profile


def rate(value) -> float | None:
    """Tokens per second of a figure; None for one that is no rate."""
    if isinstance(value, list):
        return statistics.median(value)
    return value.get("output_throughput") if isinstance(value, dict) else None


def cell(value, base) -> str:
    """A figure, with its ratio to bf16's of the same part."""
    if value is None:
        return "-"
    if (found := rate(value)) is None:
        return str(value)
    ratio = f" ({found / rate(base):.2f}x)" if base is not None else ""
    return f"{found:.1f}{ratio}"


def table(part: dict) -> str:
    """One part as a Markdown table, what is missing below."""
    variants = part["variants"]
    names = list(dict.fromkeys(name for variant in variants.values() for name in variant["figures"]))
    machine = part["machine"]
    where = machine["gpu"] or "no GPU"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("vllm", "torch", "vllm-flute") if name in machine)
    dry_run = " (DRY RUN: tiny shapes, no figure counts)" if part["dry_run"] else ""
    together = f"; {part['together']}" if "together" in part else ""
    title = f"**{part['part']}**{dry_run}: {where}, {versions}{together}"
    lines = [title, "", f"| | {' | '.join([*names, 'weights, GiB'])} |", "|---" * (len(names) + 2) + "|"]
    base = variants.get("bf16", {}).get("figures", {})
    for label, variant in variants.items():
        cells = [cell(variant["figures"].get(name), base.get(name) if label != "bf16" else None) for name in names]
        weights = variant.get("weights_gib")
        cells.append(f"{weights:.2f}" if weights else "-")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    missing = [f"- {label}: {variant['missing']}" for label, variant in variants.items() if "missing" in variant]
    profiles = gpu_serving_profile.table(variants)
    return "\n".join([*lines, *(["", "Missing:", *missing] if missing else []), *(["", profiles] if profiles else [])])


def plot(parts: list[dict], path: Path) -> bool:
    """Ratio to bf16 over streams, a panel for each part; False without matplotlib or anything to draw."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [part for part in parts if "bf16" in part["variants"] and len(part["variants"]) > 1]
    if not panels:
        return False
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, part in zip(axes[0], panels, strict=True):
        base = part["variants"]["bf16"]["figures"]
        for label, variant in part["variants"].items():
            shared = [n for n in variant["figures"] if n in base and " x" in n and "heavy" not in n]
            points = [(int(n.rpartition("x")[2]), rate(variant["figures"][n]) / rate(base[n])) for n in shared]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set(
            title=part["part"] + " (dry run)" * part["dry_run"], xlabel="streams", ylabel="tokens/s, ratio to bf16"
        )
        axis.set_xscale("log", base=2)
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def write(out: Path) -> str:
    """Write report.md and, where it can be drawn, report.png beside the parts' JSON; returns the text."""
    parts = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    parts = [part for part in parts if "part" in part]
    text = "\n\n".join(table(part) for part in parts) + "\n"
    if plot(parts, out / "report.png"):
        text += "\n![ratio to bf16](report.png)\n"
    (out / "report.md").write_text(text)
    return text
