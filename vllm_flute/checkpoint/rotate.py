"""Rotations folded into a checkpoint's weights: the same function, without outliers and lattices in the weights.

QuaRot (arXiv 2404.00456, section 4, stages 1a and 1b) and SpinQuant (arXiv 2405.16406, section 3.1): RMSNorm without
weights commutes with an orthogonal matrix, so the residual stream can be rotated between the embedding and the head;
the values of an attention head can be rotated between v and o. Both cost nothing at run time. What lies between
gate/up and down cannot be folded, because SiLU and the product act on single channels.
"""

import math
import re
from pathlib import Path

import torch

from .. import __version__
from ..errors import FluteError
from .config import HEAD
from .llama import require_llama_layers
from .output import Output, copy_files
from .reader import Checkpoint
from .rewrite import Progress, fingerprint, require_elsewhere, require_plain, rewrite

EMBEDDING = "model.embed_tokens.weight"
_HEAD = f"{HEAD}.weight"
_NORM = "model.norm.weight"
# The norm before each linear that reads the residual stream; o_proj and down_proj write to it.
_NORM_BEFORE = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm")
_NORM_BEFORE |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm")
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_NAME = re.compile(r"(model\.layers\.\d+)\.(.+)\.(weight|bias)")
_ROWS = 4096  # rows of a matrix that are rotated at once: the copies in fp32 are small beside a large embedding
_FACTOR = 64  # the largest Hadamard factor: two dense products with 64 columns are cheaper than one with 4096


def _orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal matrix fp64 ``[n, n]``, uniform (Haar): QR of Gaussians with R's diagonal made positive."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _hadamard(n: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix over ``sqrt(n)``, fp64 ``[n, n]``; n is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(n)


class Rotation:
    """An orthogonal matrix ``Q [n, n]``: random signs, then a Kronecker product of small orthogonal factors.

    Args:
        n: size.
        seed: of the signs and of the random factors.
        kind: "hadamard": a randomized Hadamard matrix; an odd part of n gets a random orthogonal factor
            (576 = 9 * 64). "orthogonal": one random orthogonal matrix, uniformly distributed.
    """

    def __init__(self, n: int, seed: int, kind: str = "hadamard"):
        generator = torch.Generator().manual_seed(seed)
        self.signs = torch.randint(0, 2, (n,), generator=generator).mul(2.0).sub(1.0).to(torch.float64)
        if kind == "orthogonal":
            self.factors = [_orthogonal(n, generator)]
            return
        power = n & -n
        self.factors = [_orthogonal(n // power, generator)] if n > power else []
        while power > 1:
            part = min(power, _FACTOR)
            self.factors.append(_hadamard(part))
            power //= part

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ Q`` over the last axis of ``x [..., n]``, fp32 or fp64."""
        x = x * self.signs.to(x.dtype)
        shape = x.shape
        for factor in self.factors:
            # Each factor turns the leading axis to the end: after all of them the order is the first one again.
            x = x.reshape(-1, len(factor), shape[-1] // len(factor)).transpose(1, 2) @ factor.to(x.dtype)
        return x.reshape(shape)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """``Q^T @ weight`` for ``weight [n, K]``."""
        return self.apply(weight.T).T


class RotatedCheckpoint(Checkpoint):
    """A checkpoint of one of `llama.MODEL_TYPES` seen with its residual stream, and its values by head, rotated.

    Norms' weights are folded into the linears that follow them and become ones; a head that is tied to the embedding
    becomes one of its own, because only it takes the last norm. Tensors keep their dtype, are computed in fp32 (fp64
    for fp32 weights) and one at a time.

    Args:
        source: a directory or hub id.
        seed: of the random rotations.
        kind: see `Rotation`.

    Raises:
        FluteError: another architecture, a quantized source, missing tensors.
    """

    def __init__(self, source: str | Path, seed: int = 0, kind: str = "hadamard"):
        super().__init__(source)
        require_plain(self)
        require_llama_layers(self, "--rotate", "quantize it without")
        for name in (EMBEDDING, _NORM):
            if name not in self.headers:
                raise FluteError(f"--rotate: {self.path} has no tensor {name}")
        self.stored_bytes = super().nbytes
        if self.tied_head:
            self.headers[_HEAD] = self.headers[EMBEDDING]
        self.stored_head = EMBEDDING if self.tied_head else _HEAD
        self.config = self.config | {"tie_word_embeddings": False}
        hidden, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        self.residual = Rotation(hidden, seed, kind)
        self.value = Rotation(self.config.get("head_dim") or hidden // heads, seed + 1, kind)

    @property
    def nbytes(self) -> int:
        """Bytes of the source's tensors."""
        return self.stored_bytes

    def tensor(self, name: str) -> torch.Tensor:
        """One rotated tensor, in the dtype that it is stored in."""
        if name == EMBEDDING:
            return self._rotated(super().tensor(name))
        if name == _HEAD:
            return self._rotated(super().tensor(self.stored_head), super().tensor(_NORM))
        stored = super().tensor(name)
        if name == _NORM:
            return torch.ones_like(stored)
        found = _NAME.fullmatch(name)
        if not found:
            return stored
        layer, part, kind = found.groups()
        if part in _NORM_BEFORE.values():
            return torch.ones_like(stored)
        wide = stored.to(torch.float64 if stored.dtype == torch.float32 else torch.float32)
        if part == "self_attn.v_proj":
            wide = self._by_head(wide.T if kind == "weight" else wide)
            wide = wide.T if kind == "weight" else wide
        if kind == "bias":
            return (self.residual.apply(wide) if part in _WRITERS else wide).to(stored.dtype)
        if part in _NORM_BEFORE:
            return self._rotated(wide, super().tensor(f"{layer}.{_NORM_BEFORE[part]}.weight"), stored.dtype)
        if part == "self_attn.o_proj":
            wide = self._by_head(wide)
        if part in _WRITERS:
            return self.residual.rows(wide).to(stored.dtype).contiguous()
        return stored

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """The last axis ``[heads * head_dim]`` rotated head by head."""
        size = len(self.value.signs)
        return self.value.apply(x.reshape(*x.shape[:-1], -1, size)).reshape(x.shape)

    def _rotated(
        self, weight: torch.Tensor, norm: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """``weight * norm @ Q`` of the inputs of ``weight [N, hidden]``, in row chunks."""
        out = torch.empty(weight.shape, dtype=dtype or weight.dtype)
        wide = torch.float64 if out.dtype == torch.float32 else torch.float32
        for i in range(0, len(weight), _ROWS):
            part = weight[i : i + _ROWS].to(wide)
            out[i : i + _ROWS] = self.residual.apply(part if norm is None else part * norm.to(wide))
        return out


def rotate_checkpoint(
    src: str | Path,
    out: str | Path,
    seed: int = 0,
    kind: str = "hadamard",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a plain checkpoint's rotated twin, streamed and restartable like the quantizer; returns ``out``."""
    source = RotatedCheckpoint(src, seed, kind)
    require_elsewhere(source, out)
    options = {"version": __version__, "rotate": kind, "seed": seed}
    with Output(out, fingerprint(source, options), overwrite) as output:
        rewrite(source.headers, lambda name: ({name: source.tensor(name)}, None), output, progress)
        card = f"A plain checkpoint whose residual stream is rotated ({kind}, seed {seed}) by vllm-flute.\n"
        copy_files(source.path, output.path)
        output.finish(source.config, card)
    return Path(out)
