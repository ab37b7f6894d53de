"""Evaluation without a server: transformers on dequantized weights, and divergence from a reference model."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from ..checkpoint import Checkpoint, check_checkpoint
from ..checkpoint.products import FastProducts
from ..checkpoint.quantize import dequantized
from ..errors import FluteError
from .perplexity import Score

Windows = Sequence[tuple[list[int], int]]
# Rows whose fp32 distributions are compared at once: a whole window's would be gigabytes with a large vocabulary.
_ROWS = 64


class OfflineModel:
    """A plain or lut-v1 checkpoint, its weights dequantized and rounded once, run by transformers on the CPU.

    Args:
        source: a directory or hub id.
        dtype: of weights and activations.

    Raises:
        FluteError: a checkpoint that is broken, quantized by another method or of an unknown architecture.
    """

    def __init__(self, source: str | Path, dtype: torch.dtype = torch.bfloat16):
        from transformers import AutoConfig, AutoTokenizer
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        checkpoint = Checkpoint(source)
        try:
            config = AutoConfig.from_pretrained(checkpoint.path)
            self.tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
            architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        except (OSError, ValueError, KeyError) as e:
            raise FluteError(f"{source}: transformers cannot run it offline ({type(e).__name__}: {e})") from None
        if "quantization_config" in checkpoint.config:
            check_checkpoint(checkpoint.path)  # refuses other methods
            del config.quantization_config  # the weights are given dequantized
        weights = dequantized({name: checkpoint.tensor(name) for name in checkpoint.headers})
        weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
        self.dtype, self.context, self.vocabulary = dtype, config.max_position_embeddings, config.vocab_size
        self.model = architecture.from_pretrained(None, config=config, state_dict=weights, dtype=dtype).eval()

    def tokens(self, text: str) -> tuple[list[int], list[int]]:
        """(token ids of a text, those of the beginning of a text)."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer("")["input_ids"]

    @torch.inference_mode()
    def logits(self, windows: Windows) -> Iterable[torch.Tensor]:
        """For each window the logits ``[new, vocabulary]`` that predict its last ``new`` tokens."""
        for ids, new in windows:
            # A token is predicted at the position before it.
            with FastProducts():
                found = self.model(torch.tensor([ids]), logits_to_keep=new + 1).logits[0, :-1]
            yield found


def keep_logits(model: OfflineModel, windows: Windows, path: Path) -> list[torch.Tensor]:
    """A reference model's logits in a file, one mapped tensor ``[new, vocabulary]`` of its dtype for each window.

    A file of the right size is taken as it is.
    """
    rows = [new for _, new in windows]
    size = sum(rows) * model.vocabulary
    complete = path.exists() and path.stat().st_size == size * model.dtype.itemsize
    temporary = path if complete else path.with_name(f"{path.name}.tmp")
    stored = torch.from_file(str(temporary), shared=True, size=size, dtype=model.dtype).view(-1, model.vocabulary)
    kept = list(stored.split(rows))
    if not complete:
        for place, found in zip(kept, model.logits(windows), strict=True):
            place.copy_(found)
        temporary.rename(path)
    return kept


def score(
    logits: Iterable[torch.Tensor],
    windows: Windows,
    reference: Iterable[torch.Tensor] | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Score:
    """Perplexity of a model on windows of text, and its divergence from a reference.

    Args:
        logits: for each window ``[new, vocabulary]``, any float dtype.
        windows: as of `strided_windows`.
        reference: the same of another model with the same vocabulary.
        progress: called with (tokens scored, tokens in all).

    Raises:
        FluteError: vocabularies of different sizes.
    """
    nats = divergence = 0.0
    agreed = count = 0
    tokens = sum(new for _, new in windows)
    others = reference if reference is not None else [None] * len(windows)
    for (ids, new), found, other in zip(windows, logits, others, strict=True):
        if other is not None and other.shape != found.shape:
            raise FluteError(
                f"the reference has {other.shape[-1]} tokens in its vocabulary, the model {found.shape[-1]}: "
                "give the model that was quantized"
            )
        targets = torch.tensor(ids[-new:])
        for i in range(0, new, _ROWS):
            own = found[i : i + _ROWS].float().log_softmax(-1)
            nats -= own.gather(1, targets[i : i + _ROWS].unsqueeze(1)).sum().item()
            if other is not None:
                plain = other[i : i + _ROWS].float().log_softmax(-1)
                divergence += (plain.exp() * (plain - own)).sum().item()
                agreed += (plain.argmax(-1) == own.argmax(-1)).sum().item()
        count += new
        progress(count, tokens)
    compared = (divergence / count, agreed / count) if reference is not None else (None, None)
    return Score(math.exp(nats / count), nats, count, len(windows), *compared)
