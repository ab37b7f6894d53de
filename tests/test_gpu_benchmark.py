"""kernels/benchmarks/gpu: its dry run goes through every section and is marked as one; rates beside assumptions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

GPU = Path(__file__).resolve().parent.parent / "kernels" / "benchmarks" / "gpu"
# What the machine with the GPU has besides torch and numpy is not known.
BLOCKED = (
    "rich",
    "typer",
    "pydantic",
    "prometheus_client",
    "psutil",
    "requests",
    "safetensors",
    "huggingface_hub",
    "vllm",
)


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """A dry run in a Python that has torch, numpy, triton and matplotlib, and its folder."""
    folder = tmp_path_factory.mktemp("dry")
    block = "import sys, runpy; sys.modules.update(dict.fromkeys({names!r}, None)); sys.argv = sys.argv[1:]; "
    code = block.format(names=BLOCKED) + "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, GPU / "measure.py", "--dry-run", "--out", folder, "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=600)
    return done, folder


@pytest.fixture(scope="module")
def result(dry) -> dict:
    done, folder = dry
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "results.json").read_text())


def test_every_section_ran_or_says_why_not(result):
    assert result["complete"] and result["schema"] == 1 and result["seed"] == 7
    status = {name: section["status"] for name, section in result["sections"].items()}
    assert list(status) == ["facts", "micro", "checks", "timing", "repack", "sanitizer"]
    assert {name for name in status if status[name].startswith("done")} == {"facts", "checks", "timing", "repack"}
    assert status["micro"] == status["sanitizer"] == "skipped: there is no GPU"


def test_a_dry_run_says_so_everywhere(dry, result):
    done, folder = dry
    title = "DRY RUN on a CPU: these figures measure nothing"
    assert result["dry_run"] is True and "gpu" not in result["facts"]
    assert title in done.stdout and (folder / "table.txt").read_text().startswith(title)


def test_every_kernel_was_compared_and_none_was_wrong(result):
    checks = result["checks"]
    assert len(checks["kernels"]) == 2 and "triton" in checks["kernels"]
    assert checks["failed"] == 0 and checks["failures"] == []
    assert set(checks["by_kind"]) == {"round trip", "ragged", "other scales", "decode", "repeats", "gated", "normed"}
    for kernel in checks["kernels"]:
        assert checks["calls"][kernel] >= 10
        assert 0 < checks["worst_error_to_bound"][kernel] <= 1 and checks["worst_relative_error"][kernel] < 0.01


def test_every_point_was_timed_beside_cublas_place(result):
    rows = result["timing"]["rows"]
    assert {(row["n"], row["m"]) for row in rows} == {(n, m) for n in (32, 40) for m in (1, 3, 8)}
    assert {row["bits"] for row in rows} == {2, 3, 4, 16} and {row["group_size"] for row in rows} == {0, 64, 128}
    for row in rows:
        assert row["us"] > 0 and row["ratio"] > 0 and row["gb_s"] == pytest.approx(row["nbytes"] / row["us"] / 1e3)
    assert all(row["ratio"] == 1 for row in rows if row["source"] == "torch")
    chosen = [(row["n"], row["m"], row["bits"], row["group_size"]) for row in rows if row["chosen"]]
    assert len(chosen) == len(set(chosen)) == len(rows) // 7 * 3  # cuBLAS, and two kernels for each of three widths
    assert set(result["timing"]["peers_missing"]) >= {"vllm marlin", "vllm machete"}
    assert [row["bits"] for row in result["repack"]] == [4, 3, 2]


def test_plots_are_images(dry, result):
    pytest.importorskip("matplotlib")
    for name in ("speedup.png", "roofline.png"):
        assert (dry[1] / name).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def modules(monkeypatch):
    """The benchmark's modules, which find each other as a script's do."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(GPU))
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == GPU:
            del sys.modules[name]


def test_rates_stand_beside_what_was_assumed(modules):
    import micro

    printed = [
        {"name": "prmt", "warps": 32, "per_cycle": 32.0},
        {"name": "decode_4bit_8tokens_row256", "per_cycle": 23.27},
    ]
    printed.append({"name": "read_global", "gb_s": 1.0})
    prmt, decode, read = micro.rows("\n".join(map(json.dumps, printed)))
    assert prmt["ratio"] == 0.5 and prmt["assumed"] == 64
    # 16 wavefronts of codes, 8 of activations, 64 of lookups for 64 x 64 weights.
    assert decode["assumed"] == pytest.approx(4096 / 88) and decode["assumed_from"] == "limited by shared memory"
    assert decode["ratio"] == pytest.approx(0.5, abs=0.001) and "assumed" not in read


def test_a_wrong_weight_is_found(modules, monkeypatch):
    """The checks fail where one weight is wrong, where a result is not written, and where a call raises."""
    import checks
    import torch
    import weights

    class Broken(weights.Packed):
        def call(self, x, bias=None):
            y = x.new_empty(x.shape[0], self.n) if self.kernel == "unwritten" else super().call(x, bias)
            if self.kernel == "one weight":
                y[:, 5] += 0.02 * x[:, 17]
            if self.kernel == "raises":
                raise RuntimeError("no")
            return y

    def pack(layer, kernel):
        return Broken(
            kernel, layer.matrix.n, *weights.dispatch.pack_parts(*layer[1:], layer.group_size, layer[0].shards)
        )

    monkeypatch.setattr(checks, "pack", pack)
    monkeypatch.setattr(weights.ops, "lut_linear_op", lambda *a, op=weights.ops.lut_linear_op: op(*a[:-1], ""))
    kernels = {"right": "", "one weight": "", "unwritten": "", "raises": ""}
    checker = checks.Checker("cpu", kernels, (1, 8), 3)
    checker.decode(checks.SMALL, 4, 128, torch.bfloat16)
    failed = {each["kernel"] for each in checker.results.failures}
    assert failed == {"one weight", "unwritten", "raises"} and checker.results.calls["right"] == 1


def test_parts_of_the_checks_are_merged(modules, monkeypatch, capsys):
    import checks

    monkeypatch.setattr(checks, "kernels", lambda device: ({"a": "", "b": ""}, {}))
    monkeypatch.setattr(checks, "plan", lambda seed: [])
    cases = [lambda i=i: None for i in range(5)]
    monkeypatch.setattr(checks, "fixed_cases", lambda checker, small: [(case,) for case in cases])
    monkeypatch.setattr(checks, "Checker", lambda device, kernels, tokens, seed: made[seed])
    made = {seed: Given(seed) for seed in (3, 4)}
    parts = []
    for part in (0, 1):
        checks.main(["part", "a", "10", "3", str(part), "2"])
        parts.append(json.loads(capsys.readouterr().out))
    assert [part["complete"] for part in parts] == [True, True]
    whole = checks.merged(parts)
    assert whole["calls"] == {"a": 7} and whole["failed"] == 1 and len(whole["failures"]) == 1
    assert whole["worst_error_to_bound"] == {"a": 0.4} and whole["complete"]
    assert not checks.merged([whole, parts[1] | {"complete": False}])["complete"]


class Given:
    """A Checker whose results are given."""

    def __init__(self, seed: int):
        import checks

        self.results = checks.Results({"a": ""})
        self.results.calls["a"] = seed
        self.results.worst["a"] = seed / 10
        if seed == 4:
            self.results.fail("a", "case", "why")


def test_the_bound_knows_the_kernels_arithmetic(modules):
    import checks

    registry = (GPU.parents[1] / "cuda" / "registry.cpp").read_text()
    assert registry.count(f'"{checks.SCALED}"') == 1


def test_without_a_gpu_it_refuses_to_measure(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, GPU / "measure.py", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 2 and "--dry-run" in done.stderr and not (tmp_path / "out").exists()


def test_a_sanitizer_counts_what_it_says_of_our_kernels(modules):
    import measure

    report = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>(int)+0x90
=========         Host Frame: flute::cuda::lut_linear(at::Tensor) [0x1] in libvllm_flute_cuda.so
========= Invalid __shared__ read of size 16 bytes
=========     at void flute::cuda::lut_mma<4>(flute::cuda::MmaParameters)+0x1d0
========= ERROR SUMMARY: 2 errors
"""
    expected = {"finished": True, "summary": "ERROR SUMMARY: 2 errors", "our_kernels_named": 1, "wrong": 0}
    assert measure.sanitizer_result(report, 'a warning\n{"failed": 0}\n') == expected
    assert not measure.sanitizer_result("", "Traceback\n")["finished"]


@pytest.mark.parametrize("between", ["norms", "nothing"])
def test_a_chain_gives_each_layer_what_it_takes(monkeypatch, between):
    monkeypatch.syspath_prepend(str(GPU))
    import chain
    import torch

    seen = []

    def call(matrix, gated):
        def run(x):
            seen.append((matrix.name, tuple(x.shape)))
            return x.new_ones(len(x), matrix.n // 2 if gated else matrix.n)

        return run

    calls = [call(matrix, i == 2) for _ in "ab" for i, matrix in enumerate(chain.MODEL)]
    x, wide = torch.ones(3, chain.HIDDEN), torch.ones(3, chain.INTERMEDIATE)
    chain.step(calls, x, wide, torch.ones(chain.HIDDEN), between)
    assert seen == 2 * [(matrix.name, (3, matrix.k)) for matrix in chain.MODEL]


def test_a_chain_with_joined_norms_has_no_other_calls(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU))
    import chain
    import torch

    seen = []

    def operator(name: str):
        def run(x, *arguments):
            n = arguments[-2]
            seen.append((name, tuple(x.shape), n))
            y = x.new_ones(len(x), n // 2 if "silu" in name else n)
            return (y, y, x.new_ones(32, 256)) if "add" in name else y

        return run

    names = ("linear", "linear_silu", "linear_add_norm", "linear_normed", "linear_normed_silu")
    monkeypatch.setattr(chain, "ops", SimpleNamespace(**{f"lut_{name}_op": operator(name) for name in names}))
    calls = [
        chain.Layer(i, SimpleNamespace(packed=None, header=None, n=matrix.n))
        for _ in "ab"
        for i, matrix in enumerate(chain.MODEL)
    ]
    x = torch.ones(3, chain.HIDDEN)
    chain.step(calls, x, torch.ones(3, chain.INTERMEDIATE), torch.ones(chain.HIDDEN), "joined")
    layer = ["linear_normed", "linear_add_norm", "linear_normed_silu", "linear_add_norm"]
    assert [name for name, *_ in seen] == ["linear", *layer[1:], *layer]
    assert [rest for _, *rest in seen] == 2 * [[(3, matrix.k), matrix.n] for matrix in chain.MODEL]
