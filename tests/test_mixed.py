"""Widths chosen under a budget: the choice is the best one, the losses predict the model's, and the result computes."""

import itertools
import json

import pytest
import torch
from checkpoints import make_llama31
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from vllm_flute import FluteError, LutTensor, lut_linear
from vllm_flute.checkpoint import Checkpoint, check_checkpoint, quantize_checkpoint
from vllm_flute.checkpoint.mixed import Unit, choose_bits, fused_units
from vllm_flute.checkpoint.sensitivity import sample_tokens, sensitivities
from vllm_flute.cli import app
from vllm_flute.quantization import quantize

LAYERS, HIDDEN = 2, 128


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model with a layer that matters little: the second block's down_proj writes almost nothing."""
    path = make_llama31(tmp_path_factory.mktemp("mixed") / "plain", hidden=HIDDEN, layers=LAYERS)
    from safetensors.torch import load_file, save_file

    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        if (name := "model.layers.1.mlp.down_proj.weight") in tensors:
            tensors[name] *= 1e-3
            save_file(tensors, file, metadata={"format": "pt"})
    return path


@st.composite
def problems(draw):
    step = draw(st.sampled_from([1, 8, 4096]))
    units = []
    for i in range(draw(st.integers(1, 6))):
        gains = [draw(st.floats(0, 10)) for _ in range(2)]
        units.append(Unit((str(i),), step * draw(st.integers(1, 20)), (sum(gains), gains[1], 0.0)))
    total = sum(u.weights for u in units)
    return units, draw(st.integers(2 * total, 4 * total + 5))


@given(problems())
def test_the_choice_is_the_best(problem):
    units, budget = problem
    chosen = choose_bits(units, budget)

    def size(widths):
        return sum(u.weights * bits for u, bits in zip(units, widths, strict=True))

    def loss(widths):
        return sum(u.losses[bits - 2] for u, bits in zip(units, widths, strict=True))

    assert size(chosen) <= budget
    possible = (w for w in itertools.product((2, 3, 4), repeat=len(units)) if size(w) <= budget)
    assert loss(chosen) == pytest.approx(min(map(loss, possible)))


def test_sizes_without_a_common_divisor_stay_in_the_budget():
    units = [Unit((str(i),), 1_000_003 + 17 * i, (2.0, 1.0, 0.0)) for i in range(50)]
    total = sum(u.weights for u in units)
    chosen = choose_bits(units, 3 * total)
    size = sum(u.weights * bits for u, bits in zip(units, chosen, strict=True))
    # Rounding up costs less than a step for each unit: less than one unit in all.
    assert 3 * total - 2 * units[-1].weights < size <= 3 * total


def test_units_are_what_is_fused():
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"] + ["model.layers.0.mlp.up_proj"]
    assert fused_units(names) == [tuple(names[:3]), (names[3],), (names[4],)]


def rounded(weight, moments, bits, name):
    return quantize(weight, bits, 32, "nf").dequantize()


def test_losses_predict_the_divergence(plain, one_thread):
    """The estimate for one layer beside the KL divergence of a model in which that layer alone is quantized.

    2048 tokens with one sampled token each, and the neglected higher orders and cross terms, leave a factor of 2.
    """
    source = Checkpoint(plain)
    tokens = sample_tokens(source, None)
    assert tokens.shape == (4, 512) and torch.equal(tokens, sample_tokens(source, None))
    names = [name.removesuffix(".weight") for name in source.headers if "_proj" in name]
    losses = sensitivities(source, tokens, names, rounded)
    assert set(losses) == set(names)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.inference_mode():
        exact = model(tokens).logits.log_softmax(-1)
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.v_proj"):
        assert losses[name][2] > losses[name][3] > losses[name][4] > 0
        module = model.get_submodule(name)
        kept = module.weight.data
        module.weight.data = rounded(kept, None, 4, name)
        with torch.inference_mode():
            divergence = (exact.exp() * (exact - model(tokens).logits.log_softmax(-1))).sum(-1).mean().item()
        module.weight.data = kept
        assert 0.5 < losses[name][4] / divergence < 2, name
    # A thousandth of the weights, a millionth of the loss.
    assert losses["model.layers.1.mlp.down_proj"][2] < 1e-4 * losses["model.layers.0.mlp.down_proj"][2]


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_target_is_kept(plain, text, tmp_path, one_thread, calibrated):
    options = {"calibrate": text, "tokens": 1024} if calibrated else {}
    report = quantize_checkpoint(plain, tmp_path / "out", group_size=32, target_bits=3.5, **options)
    assert 3.3 < report.bits_per_weight <= 3.5
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    layers = {info.name: info for info in check_checkpoint(tmp_path / "out")}
    source, made = Checkpoint(plain), Checkpoint(tmp_path / "out")
    widths = set()
    for name, info in layers.items():
        spec = config["overrides"].get(name, config)
        t = LutTensor(*(made.tensor(f"{name}.{part}") for part in ("qweight", "scales", "codebook")))
        assert (t.bits, t.group_size) == (spec["bits"], 32) == (info.bits, info.group_size)
        widths.add(t.bits)
        x = torch.randn(3, t.shape[1])
        expected = x @ source.tensor(f"{name}.weight").float().T
        found = lut_linear(x, t)
        # The relative error of a Gaussian weight at 2 bits is .56 (absmax NormalFloat).
        assert (found - expected).norm() < 0.7 * expected.norm(), name
        torch.testing.assert_close(found, x @ t.dequantize().T, rtol=1e-4, atol=1e-3)
    assert len(widths) > 1
    assert layers["model.layers.1.mlp.down_proj"].bits == 2
    for unit in fused_units(list(layers)):
        assert len({layers[name].bits for name in unit}) == 1, unit


def test_fixed_layers_count(plain, tmp_path, one_thread):
    report = quantize_checkpoint(
        plain, tmp_path / "out", group_size=64, target_bits=3.3, lm_head=True, overrides={"o_proj": (4, 32)}
    )
    found = {layer.name: layer for layer in report.layers}
    assert found["lm_head"].bits == 4 and found["model.layers.0.self_attn.o_proj"].group_size == 32
    assert report.bits_per_weight <= 3.3


def test_the_command(plain, tmp_path, one_thread):
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["quantize", str(plain), "-o", str(out), "--group-size", "64", "--target-bits", "3"]
    )
    assert result.exit_code == 0, result.output
    assert "of 2 bits" in result.output and "of 3 bits" in result.output


@pytest.mark.parametrize("target", [2.0, 4.7])
def test_targets_out_of_reach(plain, tmp_path, target):
    with pytest.raises(FluteError, match=r"--target-bits .* take 2\.\d\d to 4\.\d\d"):
        quantize_checkpoint(plain, tmp_path / "out", group_size=32, target_bits=target)
    assert not (tmp_path / "out").exists()
