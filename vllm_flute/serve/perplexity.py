"""Scoring a text with strided windows: perplexity from a server's own prompt log-probabilities."""

import math
from collections.abc import Callable
from typing import NamedTuple

from ..errors import FluteError
from .client import Client

_WINDOWS_A_REQUEST = 4  # enough to keep a small CPU server busy, few enough to bound the answer's size


class Score(NamedTuple):
    """``perplexity = exp(nats / tokens)`` over the tokens that were scored.

    ``kl``: Kullback-Leibler divergence of the next-token distributions from a reference model's, in nats a token;
    ``top1``: the share of tokens whose most likely next token is the reference's. None without a reference.
    """

    perplexity: float
    nats: float
    tokens: int
    windows: int
    kl: float | None = None
    top1: float | None = None


def strided_windows(tokens: list[int], bos: list[int], window: int, stride: int) -> list[tuple[list[int], int]]:
    """(token ids, how many of the last to score) of each window: every token is scored once.

    A window starts with the tokenizer's beginning-of-text token where it has one. The first window scores all of
    its tokens but the first, which has no context.
    """
    length = window - len(bos)
    result, scored = [], 0
    while scored < len(tokens):
        end = min(len(tokens), max(length, scored + stride))
        start = max(0, end - length)
        new = end - scored
        if not bos and start == 0 and scored == 0:
            new -= 1
        result.append((bos + tokens[start:end], new))
        scored = end
    return [w for w in result if w[1] > 0]


def text_windows(
    tokens: list[int], bos: list[int], window: int, stride: int | None, limit: int
) -> list[tuple[list[int], int]]:
    """`strided_windows` of checked sizes; ``stride``: half a window by default; ``limit``: the largest window.

    Raises FluteError for a text too short to score and a window beyond the limit.
    """
    stride = stride or window // 2
    if not 1 <= stride < window <= limit:
        raise FluteError(f"window {window} and stride {stride}: expected 1 <= stride < window <= {limit} (the context)")
    if len(tokens) < 2:
        raise FluteError(f"the text has {len(tokens)} tokens; at least 2 are needed to score one")
    return strided_windows(tokens, bos, window, stride)


def perplexity(
    client: Client,
    text: str,
    window: int = 1024,
    stride: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Score:
    """Score a text with strided windows (https://huggingface.co/docs/transformers/perplexity).

    Args:
        window: tokens of a request, at most the model's context less one.
        stride: new tokens scored by each window after the first; default half a window.
        max_tokens: score only the beginning of the text.
        progress: called with (tokens scored, tokens in all).

    Raises:
        FluteError: a text too short to score, a window beyond the context, a server that does not answer.
    """
    bos = client.tokenize("", special=True)
    tokens = client.tokenize(text)[:max_tokens]
    # The server generates one token after the prompt.
    windows = text_windows(tokens, bos, window, stride, client.context() - 1)
    nats, count = 0.0, 0
    for i in range(0, len(windows), _WINDOWS_A_REQUEST):
        batch = windows[i : i + _WINDOWS_A_REQUEST]
        choices = client.complete([ids for ids, _ in batch], max_tokens=1, prompt_logprobs=0)
        for choice, (ids, new) in zip(sorted(choices, key=lambda c: c["index"]), batch, strict=True):
            scored = choice["prompt_logprobs"][-new:]
            for position, token in zip(scored, ids[-new:], strict=True):
                nats -= position[str(token)]["logprob"]
            count += new
        progress(count, len(tokens))
    return Score(math.exp(nats / count), nats, count, len(windows))
