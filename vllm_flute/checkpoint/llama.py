"""LLaMA's decoder layer in stages, each of which ends where linear layers have the same inputs.

Mistral's is the same, Qwen2's has biases at queries, keys and values, Qwen3's norms of each head's queries and keys.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional as F

from ..errors import FluteError
from . import products
from .reader import Checkpoint

# The linear layers that share their inputs, in the order in which they are computed.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
DTYPE = torch.bfloat16
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# (name within the decoder layer, inputs ``[tokens, K]``) -> outputs ``[tokens, N]``.
Linear = Callable[[str, torch.Tensor], torch.Tensor]


def require_llama_layers(source: Checkpoint, what: str, instead: str, length: int = 0) -> None:
    """Raises FluteError unless a checkpoint has decoder layers that are computed as LLaMA's.

    Args:
        what: needs them.
        instead: what to do without them.
        length: tokens that attention has to reach.
    """
    config = source.config
    kind, act = config.get("model_type"), config.get("hidden_act", "silu")
    window = config.get("use_sliding_window", True) and config.get("sliding_window")
    if kind not in MODEL_TYPES:
        wrong = f"model_type {kind!r}, not one of {', '.join(MODEL_TYPES)}"
    elif act != "silu":
        wrong = f"hidden_act {act!r}, not 'silu'"
    elif window and window < length:
        wrong = f"attention that reaches {window} tokens (sliding_window), not {length}"
    else:
        return
    raise FluteError(f"{what} knows LLaMA's decoder layers and those like them, {source.path} has {wrong}: {instead}")


class LlamaBlock:
    """Runs decoder layers whose weights are given with each call.

    Args:
        source: a checkpoint that `require_llama_layers` lets pass.
        length: tokens of a sequence.
    """

    def __init__(self, source: Checkpoint, length: int):
        from transformers import AutoConfig
        from transformers.models.llama import modeling_llama

        self.config = config = AutoConfig.from_pretrained(source.path)
        self.layers = config.num_hidden_layers
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.rotate = modeling_llama.apply_rotary_pos_emb
        like = torch.empty(1, 1, config.hidden_size, dtype=DTYPE)
        self.rotary = modeling_llama.LlamaRotaryEmbedding(config)(like, torch.arange(length).unsqueeze(0))

    def norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm over the last axis, of the length of ``weight``."""
        x = hidden.to(torch.float32)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return weight * x.to(hidden.dtype)

    def _attention(self, x: torch.Tensor, weights: dict[str, torch.Tensor], linear: Linear) -> torch.Tensor:
        q, k, v = (linear(name, x).unflatten(-1, (-1, self.head_dim)) for name in STAGES[0])
        if "self_attn.q_norm.weight" in weights:
            q = self.norm(q, weights["self_attn.q_norm.weight"])
            k = self.norm(k, weights["self_attn.k_norm.weight"])
        q, k = self.rotate(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *self.rotary)
        v = v.transpose(0, 1)[None]
        return products.attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)

    def stages(
        self, hidden: list[torch.Tensor], weights: dict[str, torch.Tensor], linear: Linear | None = None
    ) -> Iterator[tuple[tuple[str, ...], list[torch.Tensor]]]:
        """Yields (names of linear layers, their inputs ``[tokens, K]`` of each sequence), last ((), the outputs).

        ``weights`` is read when a stage's results are needed: what is replaced after a stage was yielded counts in the
        next ones.

        Args:
            hidden: the layer's inputs, one bf16 ``[tokens, hidden_size]`` for each sequence.
            weights: bf16, by their names within the layer, such as "mlp.up_proj.weight".
            linear: computes the linear layers, in the place of `plain_linear`, which takes ``weights``.
        """
        linear = linear or partial(plain_linear, weights)
        x = [self.norm(h, weights["input_layernorm.weight"]) for h in hidden]
        yield STAGES[0], x
        x = [self._attention(one, weights, linear) for one in x]
        yield STAGES[1], x
        hidden = [h + linear(STAGES[1][0], one) for h, one in zip(hidden, x, strict=True)]
        x = [self.norm(h, weights["post_attention_layernorm.weight"]) for h in hidden]
        yield STAGES[2], x
        gate, up = STAGES[2]
        x = [F.silu(linear(gate, one)) * linear(up, one) for one in x]
        yield STAGES[3], x
        yield (), [h + linear(STAGES[3][0], one) for h, one in zip(hidden, x, strict=True)]

    def run(
        self, hidden: list[torch.Tensor], weights: dict[str, torch.Tensor], linear: Linear | None = None
    ) -> list[torch.Tensor]:
        """The outputs of a layer; sequence by sequence, so that one sequence's stages are in memory."""
        outputs = []
        for one in hidden:
            *_, (_, result) = self.stages([one], weights, linear)
            outputs += result
        return outputs


def plain_linear(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """The linear layer of a name, by weights and biases of a decoder layer's names."""
    return products.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
