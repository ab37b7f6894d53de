"""Time and peak memory of quantizing a large model, from two of its layers with random weights."""

import json
import shutil
from pathlib import Path

import torch
from quality_child import quantize_in_child
from safetensors.torch import save_file

# hidden_size, intermediate_size, layers, heads, KV heads, size of a head, vocabulary: config.json on the hub.
MODELS = {"llama-3-8b": (4096, 14336, 32, 32, 8, 128, 128256)}
_LAYERS = 2  # the second one's time has all that a layer costs, also running the layer before with its new weights
_TOKENS = (2048, 4096)  # calibration tokens that are run, to see what a token costs


def _write(path: Path, name: str, tokenizer: Path) -> None:
    hidden, intermediate, _, heads, kv, size, vocabulary = MODELS[name]
    path.mkdir(parents=True)
    shapes = {"self_attn.q_proj": (heads * size, hidden), "self_attn.k_proj": (kv * size, hidden)}
    shapes |= {"self_attn.v_proj": (kv * size, hidden), "self_attn.o_proj": (hidden, heads * size)}
    shapes |= {"mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden)}
    shapes |= {"mlp.down_proj": (hidden, intermediate)}
    torch.manual_seed(0)
    ends = {f"{end}.weight": (vocabulary, hidden) for end in ("model.embed_tokens", "lm_head")}
    files = {f"layer{i}": {f"model.layers.{i}.{p}.weight": s for p, s in shapes.items()} for i in range(_LAYERS)}
    norms = [f"model.layers.{i}.{n}_layernorm.weight" for i in range(_LAYERS) for n in ("input", "post_attention")]
    weight_map = {}
    for file, members in {"ends": ends, **files}.items():
        tensors = {key: torch.randn(shape, dtype=torch.bfloat16) * shape[1] ** -0.5 for key, shape in members.items()}
        if file == "ends":
            tensors |= {key: torch.ones(hidden, dtype=torch.bfloat16) for key in (*norms, "model.norm.weight")}
        save_file(tensors, path / f"{file}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"{file}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
    }
    (path / "config.json").write_text(json.dumps(config))
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, path / file.name)


def _whole_model(made: dict, layers: int) -> float:
    """Seconds for all layers: the last one that was measured stands for those that were not."""
    marks = dict(made["marks"])
    last, before = marks[f"model.layers.{_LAYERS - 1}"], marks[f"model.layers.{_LAYERS - 2}"]
    return made["seconds"] + (layers - _LAYERS) * (last - before)


def measure_layer(name: str, tokenizer: Path, work: Path, methods: dict, tokens: int, calibration: Path | None) -> dict:
    """One row for each method at 4 bits, group 64: estimated seconds of the whole model, and the peak that was seen.

    Calibrated methods run with two numbers of tokens; a token's cost and what costs nothing for each are taken from
    the two for ``tokens``, and so is the peak.
    """
    source = work / f"{name}-source"
    if not (source / "config.json").exists():
        shutil.rmtree(source, ignore_errors=True)
        _write(source, name, tokenizer)
    layers = MODELS[name][2]
    results = []
    for label, (options, calibrated) in methods.items():
        options = options | {"src": str(source), "out": str(work / f"{name}-out"), "bits": 4, "overwrite": True}
        if not calibrated:
            made = quantize_in_child(options)
            results.append({"method": label, "seconds": _whole_model(made, layers), "peak_bytes": made["peak_bytes"]})
            continue
        points = []
        for count in _TOKENS:
            made = quantize_in_child(options | {"calibrate": str(calibration), "tokens": count})
            points.append((_whole_model(made, layers), made["peak_bytes"]))
        (one, least), (two, most) = points
        scale = (tokens - _TOKENS[0]) / (_TOKENS[1] - _TOKENS[0])
        row = {"method": label, "calibration_tokens": tokens, "seconds": one + (two - one) * scale}
        results.append(row | {"peak_bytes": int(max(most, least + (most - least) * scale)), "measured": points})
    return {"model": name, "threads": torch.get_num_threads(), "rows": results}
