"""Prescaled checkpoints compute what the plain ones do, and lose less where a few inputs are large."""

import json

import pytest
import torch
from checkpoints import llama_config, llama_tensors, make_llama31, save_sharded, save_shown
from transformers import AutoModelForCausalLM

from vllm_flute import FluteError
from vllm_flute.checkpoint import Checkpoint, quantize_checkpoint
from vllm_flute.checkpoint.calibrate import calibration_tokens
from vllm_flute.checkpoint.config import LutConfig
from vllm_flute.checkpoint.prescale import MAKERS, PrescaledCheckpoint, search_prescales
from vllm_flute.checkpoint.quantize import dequantized
from vllm_flute.checkpoint.rotate import RotatedCheckpoint

HIDDEN = 128
OUTLIERS = range(5, HIDDEN, 16)


@pytest.fixture(scope="module")
def outliers(tmp_path_factory):
    """Every 16th channel of the residual stream is large after each norm: the inputs of q, k, v, gate and up."""
    path = make_llama31(tmp_path_factory.mktemp("prescale") / "plain", hidden=HIDDEN, layers=2)
    source = Checkpoint(path)
    tensors = {name: source.tensor(name) for name in source.headers}
    for name in tensors:
        if name.endswith("layernorm.weight"):
            tensors[name][list(OUTLIERS)] *= 12
    save_sharded(path, tensors, shards=3)
    return path


@torch.inference_mode()
def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rotate", [False, True])
def test_logits_stay(tmp_path, bias, rotate):
    """Scales from 1/8 to 8 in every place, 8 query heads on 4 KV heads; all in fp32, the folding rounded once.

    A rounded weight is off by 2**-24 of itself: see test_rotate.py for what of it reaches the logits. Torch's own
    rounding in fp32 is of the same size.
    """
    plain = tmp_path / "plain"
    plain.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = llama_tensors(HIDDEN, 2 * HIDDEN, 2, torch.float32)
    for name in list(tensors):
        if bias and "_proj" in name:
            tensors[name.replace("weight", "bias")] = 0.1 * torch.randn(len(tensors[name]), generator=generator)
    save_sharded(plain, tensors, shards=2)
    config = llama_config(HIDDEN, 2 * HIDDEN, 2, torch.float32) | {"attention_bias": bias, "mlp_bias": bias}
    (plain / "config.json").write_text(json.dumps(config))

    source = RotatedCheckpoint(plain) if rotate else Checkpoint(plain)
    sizes = dict(zip(MAKERS, (HIDDEN, HIDDEN // 2, HIDDEN, 2 * HIDDEN), strict=True))
    scales = {
        f"model.layers.{i}.{maker}": (6 * torch.rand(n, generator=generator) - 3).exp2()
        for i in range(2)
        for maker, n in sizes.items()
    }
    folded = PrescaledCheckpoint(source, scales)
    assert folded.nbytes == source.nbytes and folded.headers == source.headers
    made = save_shown(folded, tmp_path / "folded")
    tokens = torch.arange(200).unsqueeze(0) * 5 % 1024
    expected, found = (
        logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), tokens) for path in (plain, made)
    )
    assert (found - expected).abs().max() < 300 * 2**-24 * expected.abs().max()
    changed = {name for name in source.headers if not torch.equal(folded.tensor(name), source.tensor(name))}
    parts = {name.split(".", 3)[3] for name in changed if name.startswith("model.layers.")}
    assert len(changed) == 2 * len(parts)  # nothing outside the decoder layers
    biases = {"self_attn.v_proj.bias", "mlp.up_proj.bias"} if bias else set()
    assert {p for p in parts if p.endswith("bias")} == biases and len(parts - biases) == 9


def test_query_heads_share_the_scales_of_their_kv_head(outliers):
    """v's rows over s, o's columns times s, so that each head's part of o @ v stays."""
    source = Checkpoint(outliers)
    v, o = (f"model.layers.0.self_attn.{name}_proj" for name in "vo")
    scales = torch.linspace(0.5, 2, HIDDEN // 2)
    folded = PrescaledCheckpoint(source, {v: scales})
    size = HIDDEN // 8
    for head in range(8):
        columns, rows = slice(head * size, (head + 1) * size), slice(head // 2 * size, (head // 2 + 1) * size)
        before, after = (
            c.tensor(f"{o}.weight")[:, columns].float() @ c.tensor(f"{v}.weight")[rows].float()
            for c in (source, folded)
        )
        torch.testing.assert_close(after, before, rtol=0, atol=0.01 * before.abs().max().item())


def test_large_inputs_get_scales(outliers, text):
    """Only where the inputs have outliers, and there the largest ones; what is ignored has no say."""
    source = Checkpoint(outliers)
    tokens = calibration_tokens(source, text, 2048)
    found = search_prescales(source, tokens, LutConfig(3, 64, "nf", ("lm_head",)), "nf")
    assert set(found) == {f"model.layers.{i}.{maker}" for i in range(2) for maker in MAKERS}
    for i in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            scales = found[f"model.layers.{i}.{norm}"]
            assert set(scales.topk(len(OUTLIERS)).indices.tolist()) == set(OUTLIERS)
            assert scales.max() * scales.min() == pytest.approx(1, rel=1e-5)
        assert found[f"model.layers.{i}.self_attn.v_proj"].shape == (HIDDEN // 2,)
    ignored = search_prescales(source, tokens, LutConfig(3, 64, "nf", ("lm_head", "q_proj", "k_proj", "v_proj")), "nf")
    assert (ignored["model.layers.1.input_layernorm"] == 1).all()
    assert torch.equal(ignored["model.layers.1.mlp.up_proj"], found["model.layers.1.mlp.up_proj"])


@pytest.mark.parametrize("method", ["scale-search", "gptq"])
def test_prescaled_layers_lose_less(outliers, text, tmp_path, method):
    options = {"bits": 3, "codebook": "nf", "method": method, "calibrate": text, "tokens": 2048}
    tokens = calibration_tokens(Checkpoint(outliers), text, 2048)
    model = AutoModelForCausalLM.from_pretrained(outliers, dtype=torch.float32)
    expected = logits(model, tokens)
    lost, reports = {}, {}
    for prescale in (False, True):
        out = tmp_path / str(prescale)
        reports[prescale] = quantize_checkpoint(outliers, out, prescale=prescale, **options)
        made = Checkpoint(out)
        model.load_state_dict(dequantized({name: made.tensor(name) for name in made.headers}))
        lost[prescale] = (logits(model, tokens) - expected).square().mean().item()
        assert ("2048 tokens of text, prescaled:" in (out / "README.md").read_text()) == prescale
        assert reports[prescale].prescaled == prescale
    # The first layer's q, k and v have the same inputs in both runs.
    errors = [{layer.name: layer.output_error for layer in r.layers} for r in reports.values()]
    for name in ("q_proj", "k_proj", "v_proj"):
        plain, prescaled = (e[f"model.layers.0.self_attn.{name}"] for e in errors)
        assert prescaled < (0.98 if method == "scale-search" else 0.9) * plain
    if method != "scale-search":  # 4% at a layer are less than what errors of 14 layers add up to by chance
        assert lost[True] < 0.8 * lost[False]


def test_an_interrupted_prescaled_run_continues(outliers, text, tmp_path, one_thread):
    options = {"group_size": 32, "codebook": "nf", "method": "scale-search", "calibrate": text, "tokens": 512}
    options |= {"target_bits": 3.5, "rotate": True}

    def stop(done, total, label):
        if label == "model.layers.0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(outliers, tmp_path / "out", prescale=True, progress=stop, **options)
    with pytest.raises(FluteError, match="other options"):
        quantize_checkpoint(outliers, tmp_path / "out", **options)
    quantize_checkpoint(outliers, tmp_path / "out", prescale=True, **options)
    quantize_checkpoint(outliers, tmp_path / "whole", prescale=True, **options)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--prescale needs calibration text"),
        ({"method": "absmax"}, "--prescale needs calibration text, and a method that uses it"),
        ({"method": "absmax", "calibrate": "text"}, "absmax does not use calibration text"),
    ],
)
def test_what_cannot_be_prescaled(outliers, text, tmp_path, options, message):
    if "calibrate" in options:
        options = options | {"calibrate": text}
    with pytest.raises(FluteError, match=message):
        quantize_checkpoint(outliers, tmp_path / "out", prescale=True, **options)
    assert not (tmp_path / "out").exists()
