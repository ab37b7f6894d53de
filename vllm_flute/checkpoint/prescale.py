"""Scales of the inputs folded into a checkpoint's weights: the same function, with finer steps for inputs that matter.

AWQ (arXiv 2306.00978, section 3.2): a column of W that is multiplied by s before it is rounded, and divided by s
after, loses 1/s of what it lost, as long as it does not raise the scale of its group. The division folds into what
makes the input: a norm's weight, the rows of v before o, the rows of up before down (SiLU acts on the gate alone).
Nothing is left of it at run time.
"""

from collections.abc import Mapping

import torch

from ..codebook import DEFAULT_CODEBOOK
from ..quantization import FITTED, quantize
from .calibrate import layer_weights, second_moments
from .config import LutConfig
from .llama import DTYPE, STAGES, LlamaBlock
from .reader import Checkpoint
from .rewrite import LAYER, Progress

# What makes the inputs of each of STAGES; names within the decoder layer.
MAKERS = ("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj")
_MAKER = {name: maker for maker, names in zip(MAKERS, STAGES, strict=True) for name in names}
# Exponents that are tried; 0 changes nothing. On SmolLM2-135M none above 0.625 was the best of a stage.
_EXPONENTS = tuple(i / 8 for i in range(7))
# One exponent for each stage is all that is chosen: samples are enough. Rows of each matrix, sequences of tokens.
_ROWS, _SEQUENCES = 64, 4
# Of the mean size of an input: smaller ones count as so large, or the scales of inputs that are always 0 would be 0.
_SMALLEST = 1e-2


def _scales(size: torch.Tensor, exponent: float) -> torch.Tensor:
    """``size**exponent`` fp32 ``[K]`` with largest * smallest = 1 (AWQ's equation 5 and its normalization).

    Powers of two would fold exactly, but gain less: SmolLM2-135M at 3 bits in groups of 64, NormalFloat by weighted
    scale search, has a KL divergence of .499 with them, .465 with these, .550 without (16352 held-out tokens). Rounding
    the folded weights to bf16 once more, 2**-9 of a weight at most, is nothing beside a rounding error of a tenth.
    """
    scales = size.clamp(min=_SMALLEST * size.mean().item()).pow(exponent)
    return scales / (scales.max() * scales.min()).sqrt()


def _of_inputs(scales: torch.Tensor, k: int, kv_heads: int) -> torch.Tensor:
    """The scales of K inputs from those of what makes them: query heads that share a KV head share its scales."""
    return scales if len(scales) == k else scales.view(kv_heads, 1, -1).expand(-1, k // len(scales), -1).flatten()


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Rows spread over a matrix ``[N, K]``, fp32."""
    rows = torch.linspace(0, len(weight) - 1, min(len(weight), _ROWS)).long()
    return weight[rows].to(torch.float32)


def _lost(weight: torch.Tensor, moments: torch.Tensor, scales: torch.Tensor, spec, codebook, name: str) -> float:
    """``tr((W' - W) H (W' - W)^T)``, where W' is ``weight [R, K]`` rounded with ``scales [K]``, H ``moments [K, K]``.

    Scale search stands for all methods, and NormalFloat for a table that is fitted: both are cheap.
    """
    table = DEFAULT_CODEBOOK if isinstance(codebook, str) and codebook == FITTED else codebook
    t = quantize(weight * scales, *spec, table, name=name, importance=moments.diagonal() / scales.square())
    change = t.dequantize() / scales - weight
    return (change @ moments * change).sum().item()


@torch.no_grad()
def search_prescales(
    source: Checkpoint,
    tokens: torch.Tensor,
    config: LutConfig,
    codebook: str | torch.Tensor,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Runs the plain model, one decoder layer in memory, and finds the scales of each stage's inputs.

    Args:
        source: a plain checkpoint of one of `llama.MODEL_TYPES`.
        tokens: int64 ``[sequences, length]``; the first few are used.
        config: bits and group sizes; what it ignores has no say.
        codebook: as of `quantize`.
        progress: called as ``progress(done, total, label)`` after each decoder layer.

    Returns fp32 ``[K]`` by the module that makes the K inputs, to be divided by them: MAKERS of all decoder layers; for
    v_proj K counts the KV heads.
    """
    block = LlamaBlock(source, tokens.shape[1])
    kv_heads = block.config.num_key_value_heads
    embedding = source.tensor("model.embed_tokens.weight").to(DTYPE)
    hidden = list(torch.nn.functional.embedding(tokens[:_SEQUENCES], embedding))
    found = {}
    for layer in range(block.layers):
        prefix, weights = f"model.layers.{layer}.", layer_weights(source, layer)
        for (names, inputs), maker in zip(block.stages(hidden, weights), (*MAKERS, None), strict=True):
            if maker is None:
                hidden = inputs
                continue
            moments = second_moments(inputs, full=True)
            size = torch.cat(inputs).to(torch.float32).abs().mean(0)
            if maker == "self_attn.v_proj":
                size = size.view(kv_heads, -1, block.head_dim).mean(1).flatten()
            samples = {prefix + n: _sample(weights[f"{n}.weight"]) for n in names if not config.is_ignored(prefix + n)}

            def lost(exponent: float, size=size, moments=moments, samples=samples) -> float:
                scales = _of_inputs(_scales(size, exponent), len(moments), kv_heads)
                return sum(_lost(w, moments, scales, config.layer(n), codebook, n) for n, w in samples.items())

            found[prefix + maker] = _scales(size, min(_EXPONENTS, key=lost))
        if progress:
            progress(layer + 1, block.layers, "prescale")
    return found


class PrescaledCheckpoint(Checkpoint):
    """A checkpoint of one of `llama.MODEL_TYPES` seen with scales folded into it.

    Tensors keep their dtype, are computed in fp32 (fp64 for fp32 weights) and one at a time.

    Args:
        source: the plain checkpoint, or a rotated one.
        scales: as `search_prescales` returns them; modules without an entry stay as they are.
    """

    def __init__(self, source: Checkpoint, scales: Mapping[str, torch.Tensor]):
        vars(self).update(vars(source))
        self.plain, self.scales = source, scales
        self.kv_heads = self.config.get("num_key_value_heads") or self.config["num_attention_heads"]

    @property
    def nbytes(self) -> int:
        """Bytes of the source's tensors."""
        return self.plain.nbytes

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor with the scales folded in, in the dtype that it is stored in."""
        stored = self.plain.tensor(name)
        module, _, kind = name.rpartition(".")
        layer = LAYER.search(module)
        if not layer:
            return stored
        prefix, own = module[: layer.end()], module[layer.end() :]
        made, used = self.scales.get(module), self.scales.get(f"{prefix}{_MAKER.get(own)}")
        if made is None and used is None:
            return stored
        wide = stored.to(torch.float64 if stored.dtype == torch.float32 else torch.float32)
        if made is not None:
            wide = wide / made.to(wide.dtype).view(-1, *[1] * (wide.dim() - 1))
        if used is not None and kind == "weight":
            wide = wide * _of_inputs(used.to(wide.dtype), wide.shape[1], self.kv_heads)
        return wide.to(stored.dtype).contiguous()
