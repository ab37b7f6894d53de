"""`vllm-flute doctor`: what runs on this machine, and why."""

import os
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

# CPU features that some kernel or peer can use.
_FEATURES = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vbmi", "avx512_vnni", "avx512_bf16", "avx_vnni"}
_FEATURES |= {"avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"}
_CODEBOOKS = {"ternary": [-1, 0, 1, 1], "2": range(4), "3": range(8), "4": range(16)}  # of each kind of weights


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict:
    """Model and features from /proc/cpuinfo (x86 calls them flags, Arm Features), and what torch makes of them."""
    from ..backends.table import cpu_model
    from ..checkpoint.products import has_bf16_products

    path = Path("/proc/cpuinfo")
    fields = dict(
        (part.strip() for part in line.split(":", 1))
        for line in (path.read_text().splitlines() if path.exists() else ())
        if ":" in line
    )
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": cpu_model(),
        "features": sorted(flags & _FEATURES),
        "bf16_products": has_bf16_products(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def collect() -> dict:
    """JSON of versions, the machine, every kernel with why it runs here or not, and which one each call would take."""
    import torch

    from .. import __version__, dispatch
    from ..backends import cpu, cuda
    from ..checkpoint import kernels_by_tokens

    def choices(device: str) -> dict[str, dict[str, dict[str, str]]]:
        """Kernel by kind of weights, activation dtype and M, for a layer of 4096 x 4096 and group 64."""
        found = {}
        for kind, codebook in _CODEBOOKS.items():
            table = torch.tensor([codebook], dtype=torch.float32)
            found[kind] = {
                str(dtype).removeprefix("torch."): kernels_by_tokens(table, 64, 4096, 4096, device, dtype)
                for dtype in (torch.bfloat16, torch.float16, torch.float32)
            }
        return found

    devices = {}
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        kernels = dispatch.kernels(device)
        module, why = dispatch.backend(device)
        path = dispatch.table_path(device)
        devices[device] = {
            "why": why,
            "isa": dispatch.isa(device),
            "threads": torch.get_num_threads() if module is cpu else None,
            "table": str(path) if path else None,
            "kernels": [kernel._asdict() for kernel in kernels],
            "choices": choices(device),
        }
    plugins = metadata.entry_points(group="vllm.general_plugins")
    return {
        "versions": {
            "vllm-flute": __version__,
            "torch": torch.__version__,
            "vllm": _version("vllm"),
            "transformers": _version("transformers"),
        },
        "plugin": next((p.value for p in plugins if p.value.startswith("vllm_flute")), None),
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda_library": cuda.built(),
        "isa_forced": os.environ.get("VLLM_FLUTE_ISA"),
        "devices": devices,
    }


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, the machine, and every kernel with whether it runs here and why not."""
    import json
    import logging

    logging.getLogger("vllm_flute").setLevel(logging.ERROR)  # a slow path is part of the report below
    found = collect()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    from rich.table import Table

    from ..checkpoint.summary import TOKENS
    from .walk import report_console, size

    cpu, forced = found["cpu"], found["isa_forced"]
    facts = Table(show_header=False)
    facts.add_row(
        "versions", ", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items())
    )
    facts.add_row("vLLM plugin", found["plugin"] or "not installed: pip install vllm-flute in vLLM's environment")
    facts.add_row("CPU", f"{cpu['model']}, {cpu['cores']} cores, {size(cpu['memory_bytes'])}")
    facts.add_row("CPU features", " ".join(cpu["features"]) or "none of those that kernels use")
    if not cpu["bf16_products"]:
        facts.add_row("bf16 on this CPU", "no units: plain layers are slow with many tokens; quantize --lm-head too")
    facts.add_row("GPU", found["gpu"] or "none that torch can use")
    facts.add_row("CUDA kernels", found["cuda_library"])
    facts.add_row("VLLM_FLUTE_ISA", forced or "not set: the best instruction set is used")
    console = report_console()
    console.print(facts)
    for device, state in found["devices"].items():
        console.print(f"{device}: {state['why']}")
        table = Table("kernel", "isa", "arithmetic", "runs here", "why")
        for kernel in state["kernels"]:
            why = kernel["why"] or ("in use" if kernel["isa"] == state["isa"] else "available")
            table.add_row(*(kernel[key] for key in ("name", "isa", "arithmetic")), _yes(kernel["available"]), why)
        console.print(table)
        chooser = state["table"] or "analytic default (vllm-flute bench kernels --write-table measures a table)"
        at = f" at {state['threads']} threads" if state["threads"] else ""
        console.print(f"kernels are chosen{at} by: {chooser}", highlight=False, soft_wrap=True)
        tokens = Table("weights", "activations", *(f"M = {m}" for m in TOKENS), title="kernel by tokens in a call")
        for kind, kernel_by_dtype in state["choices"].items():
            for dtype, kernel_by_m in kernel_by_dtype.items():
                tokens.add_row(kind if kind == "ternary" else f"{kind} bits", dtype, *kernel_by_m.values())
            tokens.add_section()
        console.print(tokens)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
