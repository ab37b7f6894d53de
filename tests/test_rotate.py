"""Rotated checkpoints compute what the plain ones do, and their weights are what rotation promises."""

import json

import pytest
import torch
from checkpoints import llama_config, llama_tensors, make_tiny, save_sharded
from transformers import AutoModelForCausalLM

from vllm_flute import FluteError
from vllm_flute.checkpoint import Checkpoint, quantize_checkpoint
from vllm_flute.checkpoint.rotate import RotatedCheckpoint, Rotation, rotate_checkpoint

HIDDEN = 288  # 9 * 32: a random factor and a Hadamard factor, like SmolLM2's 576


def make(path, dtype: torch.dtype, tied: bool, bias: bool):
    """Norms far from one, and biases where asked for: the folding must see both."""
    path.mkdir(parents=True)
    tensors = llama_tensors(HIDDEN, 2 * HIDDEN, 2, dtype, tied)
    generator = torch.Generator().manual_seed(1)
    for name in list(tensors):
        if "norm" in name:
            tensors[name] = (0.5 + torch.rand(HIDDEN, generator=generator)).to(dtype)
        elif bias and "_proj" in name:
            values = torch.randn(len(tensors[name]), generator=generator)
            tensors[name.replace("weight", "bias")] = (0.1 * values).to(dtype)
    save_sharded(path, tensors, shards=2)
    config = llama_config(HIDDEN, 2 * HIDDEN, 2, dtype, tied) | {"attention_bias": bias, "mlp_bias": bias}
    (path / "config.json").write_text(json.dumps(config))
    return path


@torch.inference_mode()
def logits(path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    return model(torch.arange(200).unsqueeze(0) * 5 % 1024).logits[0]


@pytest.mark.parametrize("n", [8, 36, 64, 288, 1024])
@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_rotations_are_orthogonal(n, kind):
    rotation = Rotation(n, seed=3, kind=kind)
    matrix = rotation.apply(torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(5, n, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(x), x @ matrix)
    torch.testing.assert_close(rotation.rows(x.T), matrix.T @ x.T)
    if kind == "hadamard" and n & (n - 1) == 0:
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, n**-0.5))


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)])
def test_logits_stay(tmp_path, one_thread, kind, tied, bias):
    """Weights in fp32, rotated in fp64 and rounded once; run in fp64.

    A rounded weight is off by 2**-24 of itself, so a layer's output by about 2**-24 of its size (errors of K inputs
    add like a random walk, as the output does). 16 roundings lie between input and logit; outliers of thousands of
    logits and the norms' gain take the rest of a factor 100.
    """
    source = make(tmp_path / "plain", torch.float32, tied, bias)
    rotated = rotate_checkpoint(source, tmp_path / "rotated", kind=kind)
    expected, found = logits(source), logits(rotated)
    assert (found - expected).abs().max() < 100 * 2**-24 * expected.abs().max()
    plain, made = Checkpoint(source), Checkpoint(rotated)
    assert not made.tied_head and set(made.headers) == set(plain.headers) | {"lm_head.weight"}
    changed = plain.tensor("model.layers.0.mlp.down_proj.weight") - made.tensor("model.layers.0.mlp.down_proj.weight")
    assert changed.abs().max() > 0.01  # not the identity
    for name in made.headers:
        if "norm" in name:
            assert (made.tensor(name) == 1).all()


def test_an_outlier_channel_is_spread(tmp_path):
    source = make(tmp_path / "plain", torch.bfloat16, False, False)
    plain = Checkpoint(source)
    tensors = {name: plain.tensor(name) for name in plain.headers}
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name][:, 7] *= 30
    save_sharded(source, tensors, shards=2)

    def kurtosis(w: torch.Tensor) -> float:
        w = w.float()
        return (w.pow(4).mean() / w.square().mean().square()).item()

    plain, rotated = Checkpoint(source), RotatedCheckpoint(source)
    assert rotated.tensor(name).dtype == torch.bfloat16
    assert kurtosis(rotated.tensor(name)) < 0.05 * kurtosis(plain.tensor(name))


def test_quantized_while_rotated(tmp_path, one_thread):
    """`quantize --rotate` gives the codes of the rotated checkpoint, and says so."""
    source = make(tmp_path / "plain", torch.bfloat16, True, False)
    twin = rotate_checkpoint(source, tmp_path / "twin")
    options = {"bits": 4, "group_size": 32}
    report = quantize_checkpoint(source, tmp_path / "one", rotate=True, **options)
    quantize_checkpoint(twin, tmp_path / "two", **options)
    one, two = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "two")
    assert set(one.headers) == set(two.headers) and one.config == two.config
    for name in one.headers:
        assert torch.equal(one.tensor(name), two.tensor(name)), name
    assert report.source_bytes == Checkpoint(source).nbytes
    assert "rotated" in (tmp_path / "one" / "README.md").read_text()


def test_an_interrupted_rotated_run_continues(tmp_path, one_thread):
    source = make(tmp_path / "plain", torch.bfloat16, True, False)

    def stop(done, total, label):
        if done == 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, group_size=32, rotate=True, progress=stop)
    with pytest.raises(FluteError, match="other options"):
        quantize_checkpoint(source, out, group_size=32)
    quantize_checkpoint(source, out, group_size=32, rotate=True)
    quantize_checkpoint(source, tmp_path / "whole", group_size=32, rotate=True)
    for file in (tmp_path / "whole").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_what_cannot_be_rotated(tmp_path):
    source = make_tiny(tmp_path / "tiny")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gemma2"}))
    with pytest.raises(FluteError, match="model_type 'gemma2'"):
        RotatedCheckpoint(source)
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(FluteError, match="already quantized"):
        RotatedCheckpoint(source)
