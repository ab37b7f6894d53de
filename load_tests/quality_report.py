"""The results of `quality.py` as a page: one table for each twin of the model."""

TWINS = {"plain": "The model as it is", "rotated": "Its rotated twin"}
HEADER = "| method | group | bits a weight | perplexity | KL | top-1 | MiB | s | peak MiB |\n" + "|---" * 9 + "|"


def line(r: dict) -> str:
    def cell(key: str, form: str, factor: float = 1) -> str:
        return format(r[key] * factor, form) if key in r else "-"

    perplexity = cell("perplexity", ".2f" if r["perplexity"] < 1e4 else ".2g")
    calibrated = f", {r['calibration_tokens']} tokens" if "calibration_tokens" in r else ""
    cells = [r["method"] + calibrated, str(r.get("group_size", "-")), cell("bits_per_weight", ".3f"), perplexity]
    cells += [cell("kl", ".4f"), cell("top1", ".1%"), cell("bytes", ".1f", 2**-20)]
    cells += [cell("seconds", ".0f"), cell("peak_bytes", ".0f", 2**-20)]
    return f"| {' | '.join(cells)} |"


_INTRODUCTION = """# Quality of quantized models

Written by `load_tests/quality.py --report`, which also says how everything is measured: run it with `--help`.

Model: {model}. Scored: {tokens} tokens of the second half of the text's lines, calibrated on the first half; the same
tokens and the same code for every row. KL divergence (nats a token) and top-1 agreement are to the bf16 weights of the
same twin. Bits a weight count codes, scales and tables of the decoder layers' matrices; embedding and head stay bf16 in
every row, llama.cpp's too. MiB is the size of all tensors (of llama.cpp's file). Seconds and peak MiB are the
quantizer's own; there are seconds where it had the machine to itself: {machine}.

The embedded model comes out of a file whose weights lie on an affine lattice of 16 values in blocks of 32, which
flatters affine 4-bit types. Its rotated twin is the same function without a lattice: compare there.

Rows that are missing have not been run."""


def page(results: list[dict]) -> str:
    """Markdown: for each twin the rows of a width, least KL divergence first."""
    if not results:
        return "# Quality of quantized models\n\nNothing is measured yet.\n"

    def known(key: str) -> str:
        return ", ".join(sorted({str(r[key]) for r in results if key in r}))

    parts = [_INTRODUCTION.format(**{key: known(key) for key in ("model", "tokens", "machine")})]
    for twin, title in TWINS.items():
        rows = [r for r in results if r["twin"] == twin]
        if not rows:
            continue
        sections = {
            "bf16": [r for r in rows if r["kind"] == "bf16"],
            "4 bits": [r for r in rows if r.get("bits") == 4],
            "3 bits": [r for r in rows if r.get("bits") == 3],
            "2 bits": [r for r in rows if r.get("bits") == 2],
            "mixed": [r for r in rows if "target_bits" in r],
            "llama.cpp": [r for r in rows if r["kind"] == "llama.cpp"],
        }
        parts += ["", f"## {title}", "", HEADER]
        for name, members in sections.items():
            if members:
                parts.append(f"| **{name}** | | | | | | | | |")
                parts += [line(r) for r in sorted(members, key=lambda r: r["kl"])]
        types = [f"{r['method'].removeprefix('llama.cpp ')}: {r['types']}" for r in rows if "types" in r]
        if types:
            parts += ["", f"llama.cpp's types stand for these types of matrices here: {'; '.join(types)}."]
    return "\n".join(parts) + "\n"
