"""Time and peak memory of quantizing a large model, from one and two of its layers with random weights."""

import json
import shutil
from pathlib import Path

import torch
from quality_child import learn_in_child, quantize_in_child
from safetensors.torch import save_file

from vllm_flute.checkpoint.learned import UPDATES

# hidden_size, intermediate_size, layers, heads, KV heads, size of a head, vocabulary: config.json on the hub.
MODELS = {"llama-3-8b": (4096, 14336, 32, 32, 8, 128, 128256)}
_LAYERS = 2  # the second one's time has all that a layer costs, also running the layer before with its new weights
_UPDATES = 3  # of learned scales that are run; the first one is not timed


def _write(path: Path, name: str, tokenizer: Path, count: int) -> None:
    hidden, intermediate, _, heads, kv, size, vocabulary = MODELS[name]
    path.mkdir(parents=True)
    shapes = {"self_attn.q_proj": (heads * size, hidden), "self_attn.k_proj": (kv * size, hidden)}
    shapes |= {"self_attn.v_proj": (kv * size, hidden), "self_attn.o_proj": (hidden, heads * size)}
    shapes |= {"mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden)}
    shapes |= {"mlp.down_proj": (hidden, intermediate)}
    torch.manual_seed(0)
    ends = {f"{end}.weight": (vocabulary, hidden) for end in ("model.embed_tokens", "lm_head")}
    files = {f"layer{i}": {f"model.layers.{i}.{p}.weight": s for p, s in shapes.items()} for i in range(count)}
    norms = [f"model.layers.{i}.{n}_layernorm.weight" for i in range(count) for n in ("input", "post_attention")]
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
        "num_hidden_layers": count,
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


def _source(name: str, tokenizer: Path, work: Path, count: int) -> Path:
    source = work / f"{name}-{count}-source"
    if not (source / "config.json").exists():
        shutil.rmtree(source, ignore_errors=True)
        _write(source, name, tokenizer, count)
    return source


def _options(options: dict, calibrated: bool, tokens: int, calibration: Path) -> dict:
    given = {"calibrate": str(calibration), "tokens": tokens} if calibrated else {}
    return options | given | {"bits": 4, "overwrite": True}


def _learned(name: str, tokenizer: Path, work: Path, tokens: int, calibration: Path) -> dict:
    """What learning takes beside GPTQ: an update has all layers in memory, so that one layer more tells its share."""
    found = []
    for count in (1, 2):
        options = {"src": str(_source(name, tokenizer, work, count)), "out": str(work / f"{name}-out")}
        found.append(learn_in_child(options | _options({}, True, tokens, calibration), _UPDATES))
    layers = MODELS[name][2]

    def whole(key: str) -> float:
        return found[0][key] + (layers - 1) * (found[1][key] - found[0][key])

    return {"seconds": whole("before") + UPDATES * whole("update"), "peak_bytes": int(whole("peak_bytes"))}


def measure_layer(name: str, tokenizer: Path, work: Path, methods: dict, tokens: int, calibration: Path) -> dict:
    """One row for each method at 4 bits, group 64: estimated seconds of the whole model, and its peak memory.

    The peak of all methods but learned scales, which hold the codes of all layers, is that of two layers.
    """
    layers = MODELS[name][2]
    results = []
    for method, (options, calibrated) in methods.items():
        row = {"method": method} | ({"calibration_tokens": tokens} if calibrated else {})
        if options["method"] == "learned":
            made = _learned(name, tokenizer, work, tokens, calibration)
            row["after"] = "gptq"
        else:
            paths = {"src": str(_source(name, tokenizer, work, _LAYERS)), "out": str(work / f"{name}-out")}
            made = quantize_in_child(paths | _options(options, calibrated, tokens, calibration))
            made["seconds"] = _whole_model(made, layers)
        results.append(row | {key: made[key] for key in ("seconds", "peak_bytes")})
        print(json.dumps(results[-1]), flush=True)
    return {"model": name, "threads": torch.get_num_threads(), "rows": results}
