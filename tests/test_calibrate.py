"""Calibration against transformers' own model, and calibrated runs: continued and refused."""

import json

import pytest
import torch
from checkpoints import make_llama31, make_tiny
from transformers import AutoModelForCausalLM

from vllm_flute import FluteError, quantize
from vllm_flute.checkpoint import Checkpoint, check_checkpoint, learned, quantize_checkpoint
from vllm_flute.checkpoint.calibrate import Calibration, calibration_tokens
from vllm_flute.checkpoint.quantize import _output_error


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_llama31(tmp_path_factory.mktemp("calibrate") / "plain", hidden=128, layers=2)


def test_moments_are_those_of_the_model(plain, text):
    """Every linear layer's and the head's inputs, in two layers, beside hooks on the whole model."""
    source = Checkpoint(plain)
    tokens = calibration_tokens(source, text, 2048)
    assert tokens.shape == (2, 1024)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda m, x, y, name=name: inputs.__setitem__(name, x[0].float().flatten(0, 1))
            )
    with torch.inference_mode():
        model(tokens)

    def layer(i: int) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{i}."
        return {n.removeprefix(prefix): source.tensor(n) for n in source.headers if n.startswith(prefix)}

    found: dict[bool, dict[str, torch.Tensor]] = {True: {}, False: {}}
    for full in found:
        calibration = Calibration(source, tokens, layer, full)
        for i in range(2):

            def keep(names, moments, i=i, full=full):
                found[full] |= {f"model.layers.{i}.{name}": moments for name in names}
                return {}

            assert calibration.quantize(i, keep) == {}
        found[full]["lm_head"] = calibration.head_moments()
    assert found[True].keys() == inputs.keys()
    for name, x in inputs.items():
        expected = x.T @ x / len(x)
        torch.testing.assert_close(found[True][name], expected, rtol=0.02, atol=0.01 * expected.abs().max().item())
        torch.testing.assert_close(found[False][name], found[True][name].diagonal())


@pytest.mark.parametrize("method", ["scale-search", "learned"])
def test_an_interrupted_run_continues(plain, text, tmp_path, monkeypatch, method):
    """In the middle of the layers, and of the learning of scales."""
    monkeypatch.setattr(learned, "UPDATES", 30)
    options = {"bits": 3, "group_size": 32, "method": method, "calibrate": text, "tokens": 512, "lm_head": True}
    report = quantize_checkpoint(plain, tmp_path / "whole", **options)
    assert report.calibration_tokens == 512 and len(report.layers) == 15
    assert all(0 < layer.output_error < layer.error < 1 for layer in report.layers if layer.name != "lm_head")
    assert "calibrated with 512 tokens" in (tmp_path / "whole" / "README.md").read_text()

    stops = [lambda done, label: done == 2]
    if method == "learned":
        stops.append(lambda done, label: label.startswith("scales") and done == 25)
    for wanted in stops:

        def stop(done, total, label, wanted=wanted):
            if wanted(done, label):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(plain, tmp_path / "out", progress=stop, **options)
    with pytest.raises(FluteError, match="other options"):
        quantize_checkpoint(plain, tmp_path / "out", **options | {"tokens": 256})
    quantize_checkpoint(plain, tmp_path / "out", **options)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    check_checkpoint(tmp_path / "out")


def test_an_interrupted_learning_is_overwritten(plain, text, tmp_path, monkeypatch):
    """Its state and its weights are those of other options, and leave no trace."""
    monkeypatch.setattr(learned, "UPDATES", 21)
    options = {"group_size": 32, "method": "learned", "calibrate": text, "tokens": 512}

    def stop(done, total, label):
        if label.startswith("scales") and done == 20:  # which is saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(plain, tmp_path / "out", progress=stop, bits=3, **options)
    for out in ("out", "fresh"):
        quantize_checkpoint(plain, tmp_path / out, overwrite=True, bits=2, **options)
    files = [{f.name: f.read_bytes() for f in (tmp_path / out).iterdir()} for out in ("out", "fresh")]
    assert files[0] == files[1]


@pytest.mark.parametrize("kept", [False, True])
def test_outputs_that_were_not_kept_are_computed_again(plain, text, tmp_path, monkeypatch, kept):
    """Learned scales do not depend on whether linear layers' outputs have room."""
    monkeypatch.setattr(learned, "UPDATES", 4)
    options = {"bits": 3, "group_size": 32, "method": "learned", "calibrate": text, "tokens": 512}
    quantize_checkpoint(plain, tmp_path / "all", **options)
    headers = Checkpoint(plain).headers
    rows = sum(Checkpoint(plain).tensor(name).shape[0] for name in headers if ".0." in name and "_proj" in name)
    monkeypatch.setattr(learned, "_KEPT", 2 * rows * 512 * 2 - (not kept))
    runs, forward = [], learned._Layer.forward
    monkeypatch.setattr(learned._Layer, "forward", lambda self, *a: runs.append(self) or forward(self, *a))
    quantize_checkpoint(plain, tmp_path / "some", **options)
    assert len(runs) == 4 * (2 if kept else 2 + 2)
    for file in (tmp_path / "all").glob("*.safetensors"):
        assert (tmp_path / "some" / file.name).read_bytes() == file.read_bytes(), file.name


def test_calibration_helps_the_model(plain, text, tmp_path):
    """The output's error on the calibration text falls from scale search to GPTQ, and to learned scales."""
    source = Checkpoint(plain)
    tokens = calibration_tokens(source, text, 2048)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(tokens).logits
    errors = {}
    for method, calibrate in (("scale-search", None), ("gptq", text), ("learned", text)):
        out = tmp_path / method
        quantize_checkpoint(plain, out, bits=3, method=method, calibrate=calibrate, tokens=2048)
        model.load_state_dict(dequantized_weights(out), strict=True)
        with torch.inference_mode():
            errors[method] = (model(tokens).logits - expected).square().mean().item()
    assert errors["learned"] < 0.9 * errors["gptq"] and errors["gptq"] < 0.6 * errors["scale-search"]


def dequantized_weights(path) -> dict[str, torch.Tensor]:
    from vllm_flute.checkpoint.quantize import dequantized

    made = Checkpoint(path)
    return dequantized({name: made.tensor(name) for name in made.headers})


def test_output_errors_against_inputs():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(600, 128, generator=generator), torch.randn(500, 128, generator=generator)
    x[:, 3] += 2 * x[:, 4]
    t = quantize(weight, 3)
    expected = (x @ (t.dequantize() - weight).T).norm() / (x @ weight.T).norm()
    assert _output_error(weight, t, x.T @ x / len(x)) == pytest.approx(expected.item(), rel=1e-4)


REFUSED = {
    "gptq without text": ({"method": "gptq"}, "gptq needs calibration text"),
    "absmax with text": ({"method": "absmax", "calibrate": "text"}, "absmax does not use calibration text"),
    "too short": ({"calibrate": "text", "tokens": 10**6}, "has [0-9]+ tokens, --tokens asks for 1000000"),
    "no tokens": ({"calibrate": "text", "tokens": 0}, "--tokens asks for 0"),
    "missing": ({"calibrate": "nothing.txt"}, "nothing.txt cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_calibrations(plain, text, tmp_path, case):
    options, message = REFUSED[case]
    if options.get("calibrate") == "text":
        options = options | {"calibrate": text}
    with pytest.raises(FluteError, match=message):
        quantize_checkpoint(plain, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_run(text, tmp_path):
    without_tokenizer = make_tiny(tmp_path / "tiny")
    with pytest.raises(FluteError, match="has no tokenizer that transformers can load"):
        quantize_checkpoint(without_tokenizer, tmp_path / "out", calibrate=text)
    other = make_llama31(tmp_path / "other", hidden=64, layers=1)
    config = json.loads((other / "config.json").read_text()) | {"model_type": "mamba"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(FluteError, match="--calibrate knows LLaMA's decoder layers .* has model_type 'mamba'"):
        quantize_checkpoint(other, tmp_path / "out", calibrate=text, tokens=64)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learning_looks_up_the_stored_entries(bits):
    t = quantize(torch.randn(5, 200), bits, 8, "nf")
    entries = learned._Entries(t).look_up()
    assert entries.shape == (5, 25, 8)
    assert torch.equal(entries.flatten(1), t.codebook.to(torch.bfloat16)[t.codes().long()])
