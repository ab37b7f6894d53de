"""The tokenizer in a GGUF's metadata, rebuilt for Hugging Face.

Keys: the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). How text is split before
merging, and which tokenizers put a begin token in front, GGUF says by a name only (``tokenizer.ggml.pre``): what each
name means is read from llama.cpp (src/llama-vocab.cpp).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import FluteError
from .gguf_config import token_ids
from .gguf_file import GgufFile

_KEY = "tokenizer.ggml."
# tokenizer.ggml.token_type
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


class _Split(NamedTuple):
    """How byte-level BPE splits text: a pattern, or GPT-2's (None); each digit alone; whole words before merges.

    ``composed``: text becomes Unicode's NFC first, as in Qwen2's own tokenizer (llama.cpp leaves that out).
    """

    pattern: str | None = None
    digits: bool = False
    whole_words: bool = False
    begin: bool = False
    composed: bool = False


_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_LLAMA3 = rf"{_SHORT}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_SHORT}|{_WORDS}|\p{{N}}|{_REST}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = (
    dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _Split(_LLAMA3, False, True, True))
    | dict.fromkeys(("dbrx", "smaug-bpe"), _Split(_LLAMA3))
    | {"qwen2": _Split(_QWEN2, composed=True)}
    | dict.fromkeys(("stablelm2", "deepseek-r1-qwen"), _Split(_QWEN2))
    | {"tekken": _Split(_TEKKEN, False, True, True)}
    | dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _Split(digits=True))
    | dict.fromkeys(("gpt-2", "mpt", "olmo", "phi-2"), _Split())
)


def check_tokenizer(file: GgufFile, vocabulary: int) -> bool:
    """Whether the file has a tokenizer.

    Raises FluteError for one that cannot be rebuilt; ``vocabulary``: rows of the embedding.
    """
    meta, model = file.metadata, file.metadata.get(f"{_KEY}model", "none")
    if not isinstance(model, str) or model not in ("none", "no_vocab", "gpt2", "llama"):
        raise FluteError(f"{file.path} has a tokenizer of kind {str(model)[:40]!r}: import rebuilds 'gpt2' and 'llama'")
    if model in ("none", "no_vocab"):
        return False
    pre = meta.get(f"{_KEY}pre", "default")
    if model == "gpt2" and (not isinstance(pre, str) or pre not in _SPLITS):
        raise FluteError(
            f"{file.path} has the pre-tokenizer {str(pre)[:40]!r}, which import cannot rebuild (known: "
            f"{', '.join(_SPLITS)}): convert the original model again with a current llama.cpp"
        )
    tokens = meta.get(f"{_KEY}tokens")
    if not _texts(tokens) or not tokens or len(set(tokens)) != len(tokens) or len(tokens) > vocabulary:
        raise FluteError(f"{file.path}: {_KEY}tokens is no list of at most {vocabulary} different tokens")
    types = meta.get(f"{_KEY}token_type")
    if types is not None and not _numbers(types, len(tokens)):
        raise FluteError(f"{file.path}: {_KEY}token_type has not one number for each of {len(tokens)} tokens")
    merges, scores = meta.get(f"{_KEY}merges"), meta.get(f"{_KEY}scores")
    if model == "gpt2" and (not _texts(merges) or not all(0 < m.find(" ", 1) < len(m) - 1 for m in merges)):
        raise FluteError(f"{file.path}: {_KEY}merges is no list of pairs with a space between")
    if model == "llama" and not _numbers(scores, len(tokens)):
        raise FluteError(f"{file.path}: {_KEY}scores has not one number for each of {len(tokens)} tokens")
    for key, value in token_ids(meta).items():
        for i in value if isinstance(value, list) else [value]:
            if not 0 <= i < len(tokens):
                raise FluteError(f"{file.path}: {key} is {i}, beyond its {len(tokens)} tokens")
    template = meta.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise FluteError(f"{file.path}: tokenizer.chat_template is no text")
    return True


def _texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _numbers(value, count: int) -> bool:
    return isinstance(value, np.ndarray) and len(value) == count


def _byte_level(meta: Mapping, vocab: dict[str, int]):
    """Byte-level BPE as in GPT-2, LLaMA 3 and most models since."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    split = _SPLITS[meta[f"{_KEY}pre"]]
    # A space at the start of a merge belongs to its first part.
    merges = [(m[:cut], m[cut + 1 :]) for m in meta[f"{_KEY}merges"] for cut in [m.find(" ", 1)]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=split.whole_words))
    if split.composed:
        tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split.pattern))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(meta: Mapping, vocab: dict[str, int], types: list[int]):
    """SentencePiece BPE as in LLaMA 2: of all neighbours the pair whose piece has the highest score is merged first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = meta[f"{_KEY}scores"].tolist()
    pairs = []
    for piece, i in vocab.items():
        if types[i] == _NORMAL:
            cuts = ((piece[:c], piece[c:]) for c in range(1, len(piece)))
            found = [(vocab[a], vocab[b], a, b) for a, b in cuts if a in vocab and b in vocab]
            pairs += [(-scores[i], -len(a), *ids, a, b) for *ids, a, b in found]
    merges = [pair[-2:] for pair in sorted(pairs)]
    tokens = list(vocab)
    unknown = meta.get(f"{_KEY}unknown_token_id", 0)
    unknown = tokens[unknown] if type(unknown) is int and 0 <= unknown < len(tokens) else None
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = [normalizers.Replace(" ", "▁")]
    ends = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if meta.get(f"{_KEY}add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        ends.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(ends)
    return tokenizer


def _build(meta: Mapping):
    """(tokenizer of the `tokenizers` package, its special tokens by Hugging Face's names)."""
    from tokenizers import AddedToken, processors

    tokens = meta[f"{_KEY}tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    types = meta.get(f"{_KEY}token_type")
    types = [_NORMAL] * len(tokens) if types is None else types.tolist()
    byte_level = meta[f"{_KEY}model"] == "gpt2"
    tokenizer = _byte_level(meta, vocab) if byte_level else _sentencepiece(meta, vocab, types)

    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = meta.get(f"{_KEY}{key}_token_id")
        if type(i) is int and 0 <= i < len(tokens):
            special[f"{name}_token"] = tokens[i]
    for kind, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [t for t, k in zip(tokens, types, strict=True) if k == kind or (is_special and t in special.values())]
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=is_special) for t in added])

    begin = meta.get(f"{_KEY}add_bos_token", _SPLITS[meta[f"{_KEY}pre"]].begin if byte_level else True)
    first = special.get("bos_token") if begin else None
    last = special.get("eos_token") if meta.get(f"{_KEY}add_eos_token", False) else None
    if first or last:
        ends = [t for t in (first, last) if t]
        single = " ".join(t for t in (first, "$A", last) if t)
        pair = f"{single} {single.replace('$A', '$B')}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(t, vocab[t]) for t in ends]
        )
    return tokenizer, special


def write_tokenizer(file: GgufFile, out: Path, context: int) -> None:
    """Write tokenizer.json and what belongs to it, with the chat template, into ``out``.

    Args:
        file: whose tokenizer `check_tokenizer` has passed.
        context: the longest input, in tokens.

    Raises FluteError for a vocabulary that makes no tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer, special = _build(file.metadata)
    except Exception as e:  # the Rust library raises Exception itself
        raise FluteError(
            f"{file.path}: its vocabulary makes no tokenizer ({' '.join(str(e).split())[:120]}): fetch it again"
        ) from None
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=context, clean_up_tokenization_spaces=False, **special
    )
    fast.chat_template = file.metadata.get("tokenizer.chat_template")
    fast.save_pretrained(out)
