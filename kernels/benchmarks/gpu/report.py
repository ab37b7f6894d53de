"""What a measurement left behind: the JSON's schema, the table, the plots.

    python report.py DIR      writes the table and the plots of DIR/results.json again

results.json, schema 1. All of it is there from the beginning but what a section adds when it ends (timing: after every
point). Microseconds are a call's, GB are 10^9 bytes.

    schema, dry_run, complete, started, minutes, seed, only, commit, seconds
        dry_run       true: nothing in it is a measurement of a GPU, and nothing may be quoted
        complete      every section that was asked for ran to its end, or had no reason to run
    sections      {name: {status, seconds}}; status begins with done, skipped, cut off or failed
    facts         gpu, capability, sms, l2_bytes, versions; before, after: nvidia-smi's clocks;
                  copy_gb_s (bytes read + bytes written), matmul_tflop_s: {median, min, max}
    micro         [{name, warps, per_cycle, cycles, spread, mhz, assumed, assumed_from, ratio}]: see micro.cu and
                  micro.py; read_global has gb_s and bytes
    checks        kernels, missing {kernel: why}, complete, sampled, of, seed, calls {kernel: results compared},
                  by_kind {kind: cases}, poisoned_outputs, worst_error_to_bound {kernel: x}, worst_relative_error
                  {kernel: x}, failed, failures [{kernel, case, why}], ended_by (an error of the device), lost_parts
                  [why a process that checks Triton's kernel gave no result]
    timing        peers_missing {source: why}
                  rows [{n, k, m, name, source, bits, group_size, nbytes, chosen, us, us_min, us_max, rounds, calls,
                  gb_s, ratio, prepare_s}]
                      name          a kernel, a peer, or "cublas bf16"
                      nbytes, gb_s  of weights (ours: packed), over the median us
                      chosen        the dispatcher would take it
                      ratio         us of cuBLAS in the same rounds over us
                      error         in the place of the figures where it failed
    repack        [{name, n, k, bits, group_size, us, gb_s (bytes in + out), packed_bytes, extra_bytes}]
                      extra_bytes   peak memory beyond the input and the result
    sanitizer     {tool: {finished, summary, our_kernels_named (lines of its report), wrong (results)}}
"""

import json
import sys
from pathlib import Path

DRY = "DRY RUN on a CPU: these figures measure nothing"
LAYERS_70B = 80  # meta-llama/Meta-Llama-3-70B, config.json
_COLORS = {4: "tab:blue", 3: "tab:green", 2: "tab:orange"}


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _columns(rows: list[list[str]], head: list[str]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]


def _title(result: dict) -> str:
    facts = result.get("facts", {})
    if result["dry_run"]:
        return DRY
    commit = (result["commit"] or "unknown")[:10]
    return f"{facts.get('gpu')}, torch {facts.get('torch')}, commit {commit}, {result['started']}"


def _copy(result: dict) -> float | None:
    return result.get("facts", {}).get("copy_gb_s", {}).get("median")


def _timed(result: dict) -> list[dict]:
    return [row for row in result.get("timing", {}).get("rows", []) if "us" in row]


def timing_table(result: dict) -> list[str]:
    """A line a row that was timed; * is the dispatcher's choice."""
    copy, lines = _copy(result), []
    for row in _timed(result):
        share = 100 * row["gb_s"] / copy if copy else None
        name = row["name"] + (" *" if row["chosen"] else "")
        shape = [f"{row['n']}x{row['k']}", str(row["bits"]), str(row["group_size"] or "-"), str(row["m"]), name]
        spread = f"{_figure(row['us_min'])}..{_figure(row['us_max'])}"
        rates = [_figure(value) for value in (row["gb_s"], share, row.get("ratio"))]
        lines.append([*shape, _figure(row["us"]), spread, *rates])
    head = ["NxK", "bits", "group", "M", "name", "us", "min..max", "GB/s", "% copy", "x cuBLAS"]
    return _columns(lines, head) if lines else []


def summary_table(result: dict) -> list[str]:
    """cuBLAS's time over the dispatcher's choice, a line a shape and width, a column an M; and % of the copy's rate."""
    chosen = [row for row in _timed(result) if row["chosen"] and row["group_size"] == 128]
    tokens, copy, lines = sorted({row["m"] for row in chosen}), _copy(result), []
    shapes = {(row["n"], row["k"], row["bits"]) for row in chosen}
    for n, k, bits in sorted(shapes, key=lambda shape: (-shape[2], shape[0] * shape[1])):
        by_m = {row["m"]: row for row in chosen if (row["n"], row["k"], row["bits"]) == (n, k, bits)}
        one = by_m.get(1)
        share = _figure(100 * one["gb_s"] / copy) if one and copy else "-"
        ratios = [_figure(by_m.get(m, {}).get("ratio")) for m in tokens]
        lines.append([f"{n}x{k}", str(bits), share, *ratios])
    return _columns(lines, ["NxK", "bits", "% copy, M=1", *(f"M={m}" for m in tokens)]) if lines else []


def table(result: dict, full: bool) -> str:
    """The results as text; ``full``: with a line for everything that was timed."""
    facts, lines = result.get("facts", {}), [_title(result)]
    if "copy_gb_s" in facts:
        copy, peak = facts["copy_gb_s"], facts["matmul_tflop_s"]
        spread = f"{copy['min']:.0f}..{copy['max']:.0f}"
        lines.append(f"copy {copy['median']:.0f} GB/s ({spread}), bf16 product {peak['median']:.3g} TFLOP/s")
    for name, section in result["sections"].items():
        lines.append(f"{name}: {section['status']} ({section['seconds']:.0f} s)")
    if result.get("micro"):
        rows = []
        for row in result["micro"]:
            rates = row.get("per_cycle", row.get("gb_s")), row.get("assumed"), row.get("ratio")
            from_ = row.get("assumed_from", "")
            rows.append([row["name"], str(row.get("warps", "-")), *(_figure(rate) for rate in rates), from_])
        head = ["an SM and cycle", "warps", "measured", "assumed", "ratio", "from"]
        lines += ["", *_columns(rows, head), "decode: weights; read_global: GB/s"]
    if "checks" in result:
        checks, rows = result["checks"], []
        for name in checks["kernels"]:
            errors = (checks[key].get(name) for key in ("worst_error_to_bound", "worst_relative_error"))
            rows.append([name, str(checks["calls"].get(name, 0)), *map(_figure, errors)])
        lines += ["", *_columns(rows, ["checked", "results", "worst error / bound", "worst relative error"])]
        lines += [f"not available: {name}: {why}" for name, why in checks["missing"].items()]
        failures = checks["failures"][: None if full else 5]
        lines += [f"WRONG: {each['kernel']}: {each['case']}: {each['why']}" for each in failures]
    if full:
        lines += ["", *timing_table(result)]
    shown = None if full else 5
    errors = [row for row in result.get("timing", {}).get("rows", []) if "error" in row][:shown]
    lines += [f"not timed: {row['name']} {row['n']}x{row['k']} M={row['m']}: {row['error']}" for row in errors]
    lines += [f"not timed: {name}: {why}" for name, why in result.get("timing", {}).get("peers_missing", {}).items()]
    if result.get("repack"):
        rows = []
        for row in result["repack"]:
            extra = "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.1f}"
            rows.append([row["name"], str(row["bits"]), _figure(row["us"]), _figure(row["gb_s"]), extra])
        lines += ["", *_columns(rows, ["repacked", "bits", "us", "GB/s", "extra MiB"])]
        for bits in (4, 3, 2):
            us = [row["us"] for row in result["repack"] if row["name"].startswith("70b.") and row["bits"] == bits]
            if len(us) == 4:
                total = sum(us) * LAYERS_70B / 1e6
                lines.append(f"{LAYERS_70B} times the four 70b matrices at {bits} bits: {total:.2f} s")
    short = summary_table(result)
    if short:
        lines += ["", "cuBLAS bf16's time over that of the dispatcher's choice, groups of 128", *short]
    return "\n".join(lines) + "\n"


def plots(result: dict, folder: Path) -> list[Path]:
    """PNG of the speed-up and of TFLOP/s under their roofs over M, for each shape; none where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in _timed(result) if row["group_size"] in (0, 64, 128)]
    shapes = sorted({(row["n"], row["k"]) for row in rows}, key=lambda shape: shape[0] * shape[1])
    copy, written = _copy(result), []
    if not shapes or not copy:
        return []
    ceiling = result["facts"]["matmul_tflop_s"]["median"] * 1e12
    for file, label in (("speedup.png", "time of cuBLAS bf16 / time"), ("roofline.png", "TFLOP/s")):
        across = min(4, len(shapes))
        down = -(-len(shapes) // across)
        figure, grid = pyplot.subplots(down, across, figsize=(4.2 * across, 3.4 * down), squeeze=False, sharex=True)
        for axes, (n, k) in zip(grid.flat, shapes, strict=False):
            lines: dict[tuple, list[tuple[int, float]]] = {}
            for row in rows:
                shown = row["source"] != "flute" or (row["chosen"] and row["group_size"] == 128)
                if (row["n"], row["k"]) != (n, k) or not shown or (file == "speedup.png" and "ratio" not in row):
                    continue
                name = f"vllm-flute, {row['bits']} bits" if row["source"] == "flute" else row["name"]
                value = row["ratio"] if file == "speedup.png" else 2 * row["m"] * n * k / row["us"] / 1e6
                lines.setdefault((name, row["source"] == "flute", row["bits"]), []).append((row["m"], value))
            for (name, own, bits), points in lines.items():
                style = {"marker": ".", "lw": 0.9, "ls": "--"}
                if own:
                    style = {"marker": "o", "lw": 1.6, "color": _COLORS[bits]}
                axes.plot(*zip(*sorted(points), strict=True), label=name, **style)
            if file == "roofline.png":
                tokens = sorted({row["m"] for row in rows})
                for bits, color in _COLORS.items():  # weights at the copy's rate, with a 16-bit scale for 128 of them
                    roof = [min(2 * m * copy * 1e9 * 8 / (bits + 16 / 128), ceiling) / 1e12 for m in tokens]
                    axes.plot(tokens, roof, color=color, lw=0.7, ls=":")
                axes.set_yscale("log")
            axes.set(xscale="log", title=f"{n}x{k}", xlabel="tokens (M)", ylabel=label)
            axes.grid(True, alpha=0.3)
            axes.legend(fontsize=6, frameon=False)
        roofs = "; dotted: packed weights at the copy's rate, the bf16 product's peak" if file == "roofline.png" else ""
        figure.suptitle(_title(result) + roofs, fontsize=9)
        figure.tight_layout()
        path = folder / file
        figure.savefig(path, dpi=90)
        pyplot.close(figure)
        written.append(path)
    return written


def write(result: dict, folder: Path) -> str:
    """Write table.txt and the plots; returns the table without what was timed line by line."""
    (folder / "table.txt").write_text(table(result, full=True))
    written = plots(result, folder)
    names = ", ".join(path.name for path in written) or "no plots (matplotlib is missing, or nothing was timed)"
    return table(result, full=False) + f"{folder}: results.json, table.txt, {names}"


if __name__ == "__main__":
    where = Path(sys.argv[1])
    print(write(json.loads((where / "results.json").read_text()), where))
