"""LLaMA's decoder layer in stages, each of which ends where linear layers have the same inputs."""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

# The linear layers that share their inputs, in the order in which they are computed.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
DTYPE = torch.bfloat16


class LlamaBlock:
    """Runs decoder layers whose weights are given with each call.

    Args:
        config: of transformers, LLaMA's.
        length: tokens of a sequence.
    """

    def __init__(self, config, length: int):
        from transformers.models.llama import modeling_llama

        self.config = config
        self.rotate = modeling_llama.apply_rotary_pos_emb
        like = torch.empty(1, 1, config.hidden_size, dtype=DTYPE)
        self.rotary = modeling_llama.LlamaRotaryEmbedding(config)(like, torch.arange(length).unsqueeze(0))

    def norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm of ``[..., hidden_size]``."""
        x = hidden.to(torch.float32)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return weight * x.to(hidden.dtype)

    def _attention(self, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        q, k, v = (_linear(x, weights, name).unflatten(-1, (-1, self.config.head_dim)) for name in STAGES[0])
        q, k = self.rotate(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *self.rotary)
        v = v.transpose(0, 1)[None]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)

    def stages(
        self, hidden: list[torch.Tensor], weights: dict[str, torch.Tensor]
    ) -> Iterator[tuple[tuple[str, ...], list[torch.Tensor]]]:
        """Yields (names of linear layers, their inputs ``[tokens, K]`` of each sequence), last ((), the outputs).

        ``weights`` is read when a stage's results are needed: what is replaced after a stage was yielded counts in the
        next ones.

        Args:
            hidden: the layer's inputs, one bf16 ``[tokens, hidden_size]`` for each sequence.
            weights: bf16, by their names within the layer, such as "mlp.up_proj.weight".
        """
        x = [self.norm(h, weights["input_layernorm.weight"]) for h in hidden]
        yield STAGES[0], x
        x = [self._attention(one, weights) for one in x]
        yield STAGES[1], x
        hidden = [h + _linear(one, weights, STAGES[1][0]) for h, one in zip(hidden, x, strict=True)]
        x = [self.norm(h, weights["post_attention_layernorm.weight"]) for h in hidden]
        yield STAGES[2], x
        gate, up = STAGES[2]
        x = [F.silu(_linear(one, weights, gate)) * _linear(one, weights, up) for one in x]
        yield STAGES[3], x
        yield (), [h + _linear(one, weights, STAGES[3][0]) for h, one in zip(hidden, x, strict=True)]

    def run(self, hidden: list[torch.Tensor], weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The outputs of a layer; sequence by sequence, so that one sequence's stages are in memory."""
        outputs = []
        for one in hidden:
            *_, (_, result) = self.stages([one], weights)
            outputs += result
        return outputs


def _linear(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
