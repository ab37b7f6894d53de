"""The measuring command for a GPU host: variants, time, what it keeps when an engine fails, and its tables."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_flute.checkpoint import LutConfig
from vllm_flute.errors import FluteError

LOAD_TESTS = Path(__file__).resolve().parent.parent / "load_tests"
sys.path.insert(0, str(LOAD_TESTS))
import gpu_serving  # noqa: E402
import gpu_serving_profile  # noqa: E402
import gpu_serving_report  # noqa: E402
import gpu_serving_worker  # noqa: E402
from gpu_serving_models import SHAPES, Variant, write_dummy  # noqa: E402

# ---- variants ----


@pytest.mark.parametrize("part", gpu_serving.PARTS)
def test_every_part_names_variants(part):
    for name in gpu_serving.PARTS[part]:
        how = Variant.parse(name)
        config = how.quantization_config()
        assert (config is None) == (how.method == "bf16")
        if how.method == "flute":
            lut = LutConfig.from_dict(config)
            assert (lut.bits, lut.group_size, lut.is_ignored("lm_head")) == (how.bits, how.group_size, not how.head)


@pytest.mark.parametrize("name", ["bf8", "flute-4", "flute-4-g64-body", "gguf-4-g32", "flute-4-g64,bf16"])
def test_an_unknown_variant_is_refused(name):
    with pytest.raises(ValueError, match="expected bf16, fp8 or"):
        Variant.parse(name)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gptq-4-g128", {"weight_bits": 4, "group_size": 128, "desc_act": False, "lm_head_quantized": False}),
        ("gptq-4-g128-head", {"weight_bits": 4, "group_size": 128, "is_sym": True, "lm_head_quantized": True}),
        ("awq-4-g128", {"weight_bits": 4, "group_size": 128, "zero_point": True}),
        ("fp8", {"is_checkpoint_fp8_serialized": True, "activation_scheme": "dynamic"}),
    ],
)
def test_vllm_reads_the_peers_configurations(name, fields):
    """By the classes that it takes for them on a GPU (Marlin's, where there are)."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    config = Variant.parse(name).quantization_config()
    for method in {config["quant_method"], {"gptq": "gptq_marlin", "awq": "awq_marlin"}.get(config["quant_method"])}:
        if method:
            read = get_quantization_config(method).from_config(dict(config))
            assert {key: getattr(read, key) for key in fields} == fields


@pytest.mark.parametrize("name", ["gptq-4-g128", "gptq-4-g128-head"])
def test_vllm_quantizes_a_gptq_checkpoint_without_files(name, tmp_path):
    """It takes the names of quantized layers from the checkpoint's files where config.json has none."""
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.layers.quantization.utils.gptq_utils import is_layer_gptq_quantized

    folder = write_dummy(tmp_path / "tiny", "tiny", Variant.parse(name))
    read = get_quantization_config("gptq").from_config(Variant.parse(name).quantization_config())
    read.maybe_update_config(str(folder))
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    for layer in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "lm_head"):
        prefix = layer if layer == "lm_head" else f"model.layers.1.{layer}"
        wanted = layer != "lm_head" or name.endswith("-head")
        assert is_layer_gptq_quantized(prefix, read.modules_in_block_to_quantize, fused) == wanted


def test_bytes_of_a_checkpoint():
    # Meta-Llama-3-8B has 8.03e9 and -70B 70.55e9 parameters (their model cards).
    assert Variant.parse("bf16").weight_bytes("8b") / 2 == pytest.approx(8.03e9, rel=1e-3)
    assert Variant.parse("bf16").weight_bytes("70b") / 2 == pytest.approx(70.55e9, rel=1e-3)
    linear = Variant.parse("bf16").weight_bytes("8b") / 2 - 2 * 128256 * 4096
    head, body = Variant.parse("flute-4-g128-head"), Variant.parse("flute-4-g128")
    assert body.weight_bytes("8b") == pytest.approx(linear * 4.125 / 8 + 2 * 2 * 128256 * 4096, abs=1)
    assert body.weight_bytes("8b") - head.weight_bytes("8b") == pytest.approx(128256 * 4096 * (16 - 4.125) / 8, abs=1)


def test_a_dummy_checkpoint_has_a_tokenizer_of_its_whole_vocabulary(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    folder = write_dummy(tmp_path / "tiny", "tiny", Variant.parse("gptq-4-g128-head"))
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "llama" and config.hidden_size == SHAPES["tiny"]["hidden_size"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [0, 3, 511, 7]
    assert tokenizer.decode(ids).split() == [f"w{i}" for i in ids]
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids


# ---- a part: its time, and what it keeps ----


@pytest.fixture
def part(tmp_path):
    return gpu_serving.Part("8b-4bit", tmp_path / "out", seconds=600, dry_run=True)


def on_disk(part) -> dict:
    return json.loads(part.path.read_text())["variants"]


def test_a_result_is_never_overwritten(part):
    with pytest.raises(FluteError, match=r"8b-4bit\.json exists: choose another --out"):
        gpu_serving.Part("8b-4bit", part.path.parent, 600, True)


def test_figures_are_on_disk_at_once(part, capsys):
    part.figure("bf16", "decode x1", [1.0])
    assert on_disk(part)["bf16"]["figures"] == {"decode x1": [1.0]}


def test_a_variant_without_time_is_left_out_and_said(part):
    begun = []
    for variant in gpu_serving.turns(part, ["a", "b", "c"]):
        begun.append(variant)
        part.deadline -= 300 if variant == "a" else 270
    assert begun == ["a", "b"]
    assert on_disk(part)["c"]["missing"].startswith("out of time: 30 s were left")


FAKE = """
import json, sys, time, os
job = json.load(open(sys.argv[1]))
def write(line):
    with open(job["out"], "a") as f: print(json.dumps(line), file=f)
write({"start_seconds": 1.0})
write({"load": "decode x1", "rates": [10.0]})
%s
"""


@pytest.mark.parametrize(
    ("end", "seconds", "missing"),
    [
        ("", 60, None),
        ("print('(EngineCore pid=7) ERROR 11-21 18:00:00 [core.py:1] ValueError: no such kernel'); sys.exit(1)", 60, "ValueError: no such kernel"),  # noqa: E501
        ("open(job['out'] + '.pid', 'w').write(str(os.getpid())); time.sleep(300)", 3, "out of time while it ran"),
    ],
)  # fmt: skip
def test_what_an_engine_measured_survives_its_end(part, monkeypatch, tmp_path, end, seconds, missing):
    worker, log = tmp_path / "worker.py", tmp_path / "bf16.log"
    worker.write_text(FAKE % end)
    monkeypatch.setattr(gpu_serving, "WORKER", worker)
    part.deadline = time.monotonic() + seconds
    lines = list(gpu_serving.run_worker(part, "bf16", {"loads": []}, log))
    assert lines == [{"start_seconds": 1.0}, {"load": "decode x1", "rates": [10.0]}]
    assert on_disk(part).get("bf16", {}).get("missing") == missing
    if missing and "time" in missing:
        with pytest.raises(ProcessLookupError):
            os.kill(int(Path(f"{log.with_suffix('.jsonl')}.pid").read_text()), signal.SIG_DFL)


# ---- engines started side by side ----

STARTS = """
import json, os, sys, time
job = json.load(open(sys.argv[1]))
def write(line):
    with open(job["out"], "a") as f: print(json.dumps(line), file=f)
name = os.path.basename(job["model"])
if name == "fp8": sys.exit("ValueError: no such kernel")
time.sleep({"bf16": 2, "flute-4-g64": 0, "flute-3-g64": 300}[name])
write({"start_seconds": 1.0})
while not os.path.exists(job["go"]): time.sleep(0.05)
begin = time.time()
time.sleep(1)
for load in job["loads"]: write({"load": load["name"], "rates": [begin, time.time()]})
write({"done": True})
time.sleep(300)
"""


def options(**given):
    return argparse.Namespace(**({"dry_run": True, "profile": (), "rounds": 1} | given))


def test_engines_start_at_once_and_measure_one_at_a_time(part, monkeypatch, tmp_path):
    worker, variants = tmp_path / "worker.py", ["bf16", "fp8", "flute-4-g64", "flute-3-g64"]
    worker.write_text(STARTS)
    monkeypatch.setattr(gpu_serving, "WORKER", worker)
    monkeypatch.setattr(gpu_serving, "LEAST_SECONDS", 1)
    monkeypatch.setattr(gpu_serving, "MEASURE_SECONDS", 4)
    part.deadline = time.monotonic() + 13
    gpu_serving.together(part, "tiny", variants, options(), tmp_path)
    found = on_disk(part)
    first, second = (found[name]["figures"]["decode x1"] for name in ("bf16", "flute-4-g64"))
    assert first[1] <= second[0] and part.left() > 0
    assert found["fp8"]["missing"] == "ValueError: no such kernel"
    assert found["flute-3-g64"]["missing"] == "out of time while it started"
    assert "missing" not in found["bf16"] and "missing" not in found["flute-4-g64"]
    assert "side by side" in gpu_serving_report.table(part.data)


def test_engines_that_do_not_fit_the_gpu_start_in_turn():
    names, gib = ["bf16", "flute-4-g128-head", "flute-3-g128-head", "gptq-4-g128-head"], 2**30
    kv_cache = gpu_serving.together_options("8b", 128)["kv_cache_memory_bytes"]
    assert 128 * 160 * 131072 < kv_cache < 4 * gib
    assert gpu_serving.batches("8b", names, kv_cache, 79 * gib) == [names]
    assert gpu_serving.batches("8b", names, kv_cache, 40 * gib) == [names[:2], names[2:]]
    assert gpu_serving.batches("8b", names, kv_cache, 10 * gib) == [[name] for name in names]
    assert gpu_serving.batches("8b", names, kv_cache, None) == [names]


def test_the_line_that_says_why(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "INFO fine\n(EngineCore pid=1) ERROR 11-21 18:00:00 [core.py:10] vllm_flute.errors.FluteError: group size 7\n"
        "    raise RuntimeError(\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert gpu_serving.last_error(log) == "vllm_flute.errors.FluteError: group size 7"
    log.write_text("killed\n")
    assert gpu_serving.last_error(log) == "no error line"


# ---- texts ----


def answer(tokens: list[int], *top: dict) -> dict:
    return {"tokens": tokens, "top": list(top)}


def test_texts_may_part_only_at_a_tie():
    expected = [answer([1, 2, 3], {"1": 0}, {"2": -1.0, "5": -1.25}, {"3": 0}), answer([4], {"4": 0})]
    assert gpu_serving.parting(expected, expected) == (2, 0.0)
    tie = [answer([1, 5, 9], {}, {}, {}), answer([4], {})]
    assert gpu_serving.parting(expected, tie) == (1, 0.25)
    wrong = [answer([1, 7, 3], {}, {}, {}), answer([4], {})]
    assert gpu_serving.parting(expected, wrong)[1] is None


# ---- tables ----


def test_the_table_has_ratios_to_bf16_of_the_same_part_and_what_is_missing(part, capsys):
    part.data["machine"] = {"gpu": "NVIDIA H200", "vllm": "0.25.1"}
    part.figure("bf16", "decode x1", [100.0, 90.0, 110.0])
    part.figure("flute-4-g128", "decode x1", [220.0, 230.0, 900.0])
    part.figure("flute-4-g128", "decode x8", [800.0])
    part.add("fp8", missing="ValueError: no such kernel")
    part.add("bf16", weights_gib=14.96)
    text = gpu_serving_report.write(part.path.parent)
    assert "**8b-4bit** (DRY RUN: tiny shapes, no figure counts): NVIDIA H200, vllm 0.25.1" in text
    assert "| bf16 | 100.0 | - | 14.96 |" in text
    assert "| flute-4-g128 | 230.0 (2.30x) | 800.0 | - |" in text
    assert "- fp8: ValueError: no such kernel" in text
    assert (part.path.parent / "report.md").read_text() == text


def test_served_figures_are_compared_by_output_tokens(part, capsys):
    for name, rate in (("bf16", 50.0), ("flute-4-g128-head", 75.0)):
        part.figure(name, "serve x1", {"output_throughput": rate, "median_ttft_ms": 1.0})
    assert "| flute-4-g128-head | 75.0 (1.50x) | - |" in gpu_serving_report.table(part.data)


# ---- where a step's time goes ----


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("void flute::cuda::lut_mma<4, false, flute::cuda::MmaTile<8> >(flute::cuda::MmaParameters)", "flute"),
        ("vllm_flute::lut_linear_v1", "flute"),
        ("gemv", "flute"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...> > >(Params)", "attention"),
        ("void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, ...>(...)", "attention"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "other matrix products"),
        ("void marlin::Marlin<...>(...)", "other matrix products"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16, ...>(...)", "other matrix products"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "norms"),
        ("triton_poi_fused_mul_silu_1", "activation"),
        ("void vllm::act_and_mul_kernel<...>(...)", "activation"),
        ("void vllm::rotary_embedding_kernel<...>(...)", "rotary"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float, ArgMaxOps<float>, ...> >(...)", "sampling"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("aten::normal_", "other"),
    ],
)
def test_groups_of_kernels(kernel, group):
    assert gpu_serving_profile.group_of(kernel) == group


def trace(path: Path, events: list[tuple]) -> Path:
    keys = ("cat", "name", "ts", "dur", "tid")
    spans = [dict(zip(keys, event, strict=True)) | {"ph": "X"} for event in events]
    path.write_text(json.dumps({"traceEvents": [*spans, {"ph": "M", "name": "process_name"}]}))
    return path


def test_a_trace_counts_kernels_where_there_are_any_else_operators_own_time(tmp_path):
    operators = [
        ("cpu_op", "aten::linear", 0, 10, 1),
        ("cpu_op", "aten::addmm", 2, 6, 1),
        ("cpu_op", "aten::t", 3, 1, 1),
    ]
    operators += [("cpu_op", "aten::addmm", 10, 5, 1), ("cpu_op", "aten::t", 4, 7, 2)]
    own = gpu_serving_profile.read_trace(trace(tmp_path / "a.json", operators))
    assert own == {"aten::linear": (4, 1), "aten::addmm": (10, 2), "aten::t": (8, 2)}
    kernels = [("kernel", "nvjet", 0, 3, 7), ("gpu_memset", "Memset (Device)", 9, 1, 7), ("kernel", "nvjet", 4, 2, 7)]
    found = gpu_serving_profile.read_trace(trace(tmp_path / "b.json", operators + kernels))
    assert found == {"nvjet": (5, 2), "Memset (Device)": (1, 1)}


def test_kernels_that_wait_for_others_have_the_time_after_them(tmp_path):
    """As those that are launched early: the sum is the time in which anything ran."""
    kernels = [("kernel", "first", 0, 10, 7), ("kernel", "early", 4, 12, 7), ("gpu_memcpy", "within", 5, 3, 8)]
    found = gpu_serving_profile.read_trace(trace(tmp_path / "a.json", [*kernels, ("kernel", "later", 20, 5, 7)]))
    assert found == {"first": (10, 1), "early": (6, 1), "within": (0, 1), "later": (5, 1)}


def test_a_step_is_the_difference_of_two_generations(part, capsys):
    short = {"flute::cuda::lut_mma": (100.0, 10), "prefill_gemm": (50.0, 1)}
    long = {"flute::cuda::lut_mma": (260.0, 26), "prefill_gemm": (50.0, 1), "rms_norm": (40.0, 8), "nvjet": (20.0, 4)}
    step = gpu_serving_profile.decode_step(short, long, steps=4, step_us=80.0)
    assert step["groups"] == {
        "flute": [40.0, 4.0], "norms": [10.0, 2.0], "other matrix products": [5.0, 1.0], "gap": [25.0, 0]
    }  # fmt: skip
    assert step["top"][0] == ["flute::cuda::lut_mma", "flute", 40.0, 4.0]
    part.figure("flute-4-g128", "decode x1", [12500.0])
    part.profile("flute-4-g128", "decode x1", step)
    text = gpu_serving_report.table(part.data)
    assert "| | step | flute | norms | other matrix products | gap | outside matrix products |" in text
    assert "| flute-4-g128 | 80 | 40 (4) | 10 (2) | 5 (1) | 25 | 35 (44%) |" in text


# ---- the command ----


def run(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, LOAD_TESTS / "gpu_serving.py", *args], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["8b-4bit", "--variants", "int4"], "gpu_serving: 'int4': expected bf16, fp8 or"),
        (["text"], "gpu_serving: text: --model names a checkpoint, bf16 or quantized"),
        (["8b-serve", "--together"], "gpu_serving: --together is for the parts with several engines in process"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, args, says):
    done = run(*args, "--out", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.startswith(says) and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_rate_below_zero_is_taken_again(monkeypatch):
    load = {"name": "decode x2", "kind": "decode", "streams": 2, "tokens": 8}
    times = iter([3.0, 1.0, 2.0, 2.0, 1.0, 5.0])
    monkeypatch.setattr(gpu_serving_worker, "seconds", lambda *_: next(times))
    assert gpu_serving_worker.measure(None, load, 100) == 2 * 8 / (5 - 1)
    monkeypatch.setattr(gpu_serving_worker, "seconds", lambda *_: 1.0)
    with pytest.raises(RuntimeError, match="decode x2: 5 times the longer generation was the faster one"):
        gpu_serving_worker.measure(None, load, 100)


@pytest.mark.e2e
def test_a_dry_run_measures_tiny_shapes(tmp_path):
    """One real engine, in eager mode."""
    done = run("8b-4bit", "--out", tmp_path / "out", "--dry-run", "--variants", "bf16,flute-4-g64-head")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out/8b-4bit.json").read_text())
    assert result["dry_run"] and result["machine"]["vllm"]
    figures = result["variants"]["bf16"]["figures"]
    assert list(figures) == ["decode x1", "decode x2", "prefill 64"]
    assert all(rate > 0 for rates in figures.values() for rate in rates)
    assert "DRY RUN" in (tmp_path / "out/report.md").read_text()
    step = result["variants"]["flute-4-g64-head"]["profile"]["decode x2"]
    launches = {group: count for group, (_, count) in step["groups"].items()}
    # The second of two requests may reach a busy engine a step late in one of the two traces, which are 16 steps apart.
    # Times are differences of the two: on a busy machine of either sign.
    steps = launches["flute"] / 9
    assert steps in (15 / 16, 1, 17 / 16) and math.isfinite(step["groups"]["flute"][0]) and step["step_us"] > 0
    # Of two layers of four linears, and the head.
    assert launches["norms"] == 5 * steps and launches["activation"] == 2 * steps <= launches["attention"]
    assert step["groups"].get("other matrix products", [0, 0])[1] == 0


@pytest.mark.e2e
def test_a_dry_run_of_engines_side_by_side(tmp_path):
    """Two real engines at once, without profiles."""
    args = ("8b-4bit", "--dry-run", "--together", "--profile", "off", "--variants", "bf16,flute-4-g64-head")
    done = run(*args, "--out", tmp_path / "out", "--logs", tmp_path / "logs")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out/8b-4bit.json").read_text())
    assert "side by side" in result["together"] and "side by side" in (tmp_path / "out/report.md").read_text()
    for variant in result["variants"].values():
        assert list(variant["figures"]) == ["decode x1", "decode x2", "prefill 64"] and variant["start_seconds"] > 0
        assert "profile" not in variant and "missing" not in variant
    assert {path.name for path in (tmp_path / "logs").glob("*.log")} == {"bf16.log", "flute-4-g64-head.log"}
