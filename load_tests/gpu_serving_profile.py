"""What a decode step spends where: torch profiler traces of one engine, kernel by kernel, in groups.

A trace covers prefill and warm-up too, so two are taken, of a short and a long generation of the same prompts: their
difference is decode steps alone. What no kernel covers is the gap: the step's own time, measured without a profiler,
less the kernels'. Without a GPU the same is done with the operators' own times on the CPU.
"""

import gzip
import json
import re
from collections import defaultdict
from pathlib import Path

FLUTE, PRODUCTS, OTHER, GAP = "flute", "other matrix products", "other", "gap"
TOP = 12  # kernels that are named
# By a kernel's name (CUDA's, Triton's, Inductor's, or an operator's on a CPU); the first that matches counts.
# Attention stands before matrix products: FlashAttention 3 is made of CUTLASS's.
GROUPS = (
    (FLUTE, r"flute|^(gemv|gemm|add_slices)$"),
    ("attention", r"flash|fmha|atten|attn|reshape_and_cache|paged|reduce_segments|kv_cache"),
    ("rotary", r"rotary|rope"),
    ("norms", r"norm(?!al)|rsqrt"),
    ("activation", r"silu|swiglu|gelu|act_and_mul|sigmoid"),
    (PRODUCTS, r"nvjet|cutlass|gem[mv]|marlin|cublas|split_?k|scaled_mm|awq|gptq|onednn|aten::(\w*mm|linear)"),
    ("sampling", r"sampl|arg_?max|top_?[kp]|softmax|logprob|sort|multinomial|exponential"),
    ("copies and fills", r"memcpy|memset|copy|fill|zero|aten::(cat|empty|to|clone|index|slice)"),
)


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def read_trace(path: Path) -> dict[str, tuple[float, int]]:
    """Own microseconds and calls by name: of a GPU's kernels, copies and fills, or of operators without any."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as f:
        events = [e for e in json.load(f)["traceEvents"] if e.get("ph") == "X"]
    spans = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    spans.sort(key=lambda e: e["ts"])
    own = after_others(spans)
    if not spans:
        spans = sorted((e for e in events if e.get("cat") == "cpu_op"), key=lambda e: (e["tid"], e["ts"], -e["dur"]))
        own = own_times(spans)
    total = defaultdict(lambda: (0.0, 0))
    for event, duration in zip(spans, own, strict=True):
        before = total[event["name"]]
        total[event["name"]] = (before[0] + duration, before[1] + 1)
    return dict(total)


def after_others(spans: list[dict]) -> list[float]:
    """Of each span what lasts longer than all that began before: kernels that are launched early wait for the one
    before them, and copies run beside. The sum is the time in which anything ran. Spans sorted by start.
    """
    own, end = [], float("-inf")
    for span in spans:
        over = span["ts"] + span["dur"]
        own.append(max(0.0, over - max(span["ts"], end)))
        end = max(end, over)
    return own


def own_times(spans: list[dict]) -> list[float]:
    """What each span of a thread spends outside those within it; spans sorted by thread and start."""
    own, around = [span["dur"] for span in spans], []
    for i, span in enumerate(spans):
        while around and not (
            spans[around[-1]]["tid"] == span["tid"] and span["ts"] < spans[around[-1]]["ts"] + spans[around[-1]]["dur"]
        ):
            around.pop()
        if around:
            own[around[-1]] -= span["dur"]
        around.append(i)
    return own


def decode_step(short: dict, long: dict, steps: int, step_us: float) -> dict:
    """One step from the traces of two generations that are ``steps`` apart.

    Args:
        short, long: what `read_trace` returned.
        step_us: microseconds of a step without a profiler.

    Returns ``step_us``, ``groups`` (name to [us, launches]; GAP is the rest of step_us and may be negative where
    kernels run slower under the profiler) and ``top`` ([kernel, group, us, launches]).
    """
    kernels = []
    for name, (us, calls) in long.items():
        before = short.get(name, (0.0, 0))
        kernels.append([name, group_of(name), (us - before[0]) / steps, (calls - before[1]) / steps])
    groups = {}
    for _, group, us, calls in kernels:
        before = groups.get(group, [0.0, 0.0])
        groups[group] = [before[0] + us, before[1] + calls]
    groups[GAP] = [step_us - sum(us for us, _ in groups.values()), 0]
    kernels.sort(key=lambda kernel: -kernel[2])
    return {"step_us": step_us, "groups": groups, "top": kernels[:TOP]}


def table(variants: dict) -> str:
    """Markdown of the variants' profiles, a table for each load; empty without any."""
    texts = []
    for load in dict.fromkeys(load for variant in variants.values() for load in variant.get("profile", {})):
        steps = {label: v["profile"][load] for label, v in variants.items() if load in v.get("profile", {})}
        used = {name for step in steps.values() for name in step["groups"]}
        names = [name for name in (*(group for group, _ in GROUPS), OTHER) if name in used]
        rows = [
            f"| | {' | '.join(['step', *names, GAP, 'outside matrix products'])} |",
            "|---" * (len(names) + 4) + "|",
        ]
        for label, step in steps.items():
            groups, whole = step["groups"], step["step_us"]
            cells = [f"{us:.0f} ({calls:.0f})" for us, calls in (groups.get(name, (0, 0)) for name in names)]
            rest = whole - sum(groups.get(name, (0, 0))[0] for name in (FLUTE, PRODUCTS))
            cells = [f"{whole:.0f}", *cells, f"{groups[GAP][0]:.0f}", f"{rest:.0f} ({rest / whole:.0%})"]
            rows.append(f"| {label} | {' | '.join(cells)} |")
        texts.append("\n".join([f"A step of {load}, microseconds (launches):", "", *rows]))
    return "\n\n".join(texts)
