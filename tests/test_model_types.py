"""Models whose decoder layers are like LLaMA's: calibrated, folded, and learned as their own code computes them."""

import json

import pytest
import torch
from checkpoints import make_like, save_shown
from transformers import AutoModelForCausalLM

from vllm_flute import FluteError
from vllm_flute.checkpoint import Checkpoint, check_checkpoint, dequantize_checkpoint, learned, quantize_checkpoint
from vllm_flute.checkpoint.calibrate import calibration_tokens, layer_weights
from vllm_flute.checkpoint.llama import MODEL_TYPES, LlamaBlock
from vllm_flute.checkpoint.prescale import MAKERS, PrescaledCheckpoint
from vllm_flute.checkpoint.rotate import RotatedCheckpoint

HIDDEN, LAYERS = 256, 2
OTHERS = [kind for kind in MODEL_TYPES if kind != "llama"]  # which every other test is of


@torch.inference_mode()
def logits(path, tokens: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits


@pytest.mark.parametrize("kind", OTHERS)
def test_layers_compute_what_the_model_does(tmp_path, kind):
    """Both round to bf16 after each step, in the same places but for what attention does within."""
    plain = make_like(tmp_path / "plain", kind)
    source, tokens = Checkpoint(plain), torch.arange(300).unsqueeze(0) * 7 % 900
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    kept = []
    model.model.norm.register_forward_pre_hook(lambda module, args: kept.append(args[0][0]))
    block = LlamaBlock(source, tokens.shape[1])
    with torch.inference_mode():
        model(tokens)
        hidden = [model.model.embed_tokens(tokens)[0]]
        for layer in range(LAYERS):
            hidden = block.run(hidden, layer_weights(source, layer))
    difference = (hidden[0].float() - kept[0].float()).norm() / kept[0].float().norm()
    assert difference < 0.02


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_folded_in_leaves_the_logits(tmp_path, kind):
    """Rotations, and scales from 1/8 to 8 in every place; bounds: see test_rotate.py and test_prescale.py."""
    plain = make_like(tmp_path / "plain", kind, dtype=torch.float32)
    rotated = RotatedCheckpoint(plain)
    generator = torch.Generator().manual_seed(1)
    scales = {}
    for layer in range(LAYERS):
        for maker in MAKERS:
            name = f"model.layers.{layer}.{maker}"
            n = rotated.headers[f"{name}.weight"].shape[0]
            scales[name] = (6 * torch.rand(n, generator=generator) - 3).exp2()
    folded = PrescaledCheckpoint(rotated, scales)
    made = save_shown(folded, tmp_path / "folded")
    tokens = torch.arange(200).unsqueeze(0) * 5 % 900
    expected, found = logits(plain, tokens), logits(made, tokens)
    assert (found - expected).abs().max() < 400 * 2**-24 * expected.abs().max()


@pytest.mark.parametrize("kind", OTHERS)
def test_the_best_recipe(tmp_path, text, kind, monkeypatch):
    """Everything at once: widths chosen, rotated, prescaled, GPTQ, scales learned; it loses less than without text."""
    monkeypatch.setattr(learned, "UPDATES", 12)
    plain = make_like(tmp_path / "plain", kind)
    tokens = calibration_tokens(Checkpoint(plain), text, 2048)
    expected = logits(plain, tokens)
    calibrated = {"calibrate": text, "tokens": 2048, "method": "learned", "rotate": True, "prescale": True}
    lost = {}
    for name, options in (("free", {"bits": 3}), ("best", calibrated | {"target_bits": 3.5})):
        report = quantize_checkpoint(plain, tmp_path / name, group_size=32, **options)
        assert report.bits_per_weight < 3.51  # tables are a few bytes more
        check_checkpoint(tmp_path / name)
        made = dequantize_checkpoint(tmp_path / name, tmp_path / f"{name}-plain", dtype="float32")
        lost[name] = (logits(made, tokens) - expected).square().mean().item()
    assert lost["best"] < 0.6 * lost["free"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "has model_type 'gemma2', not one of llama, mistral"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu', not 'silu'"),
        ({"sliding_window": 256}, "attention that reaches 256 tokens .sliding_window., not 512: give widths"),
    ],
)
def test_layers_of_another_kind(tmp_path, change, message):
    plain = make_like(tmp_path / "plain", "mistral")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(FluteError, match=f"--target-bits knows LLaMA's decoder layers .*{message}"):
        quantize_checkpoint(plain, tmp_path / "out", target_bits=3.5)
    assert not (tmp_path / "out").exists()
