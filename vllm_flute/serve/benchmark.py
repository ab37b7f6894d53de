"""Serving benchmark: several models on the same machine in the same run, round after round.

Every server is up for the whole run and the rounds alternate between them, so that a noisy machine disturbs all
alike; a figure is the median of the rounds. A server that is not being measured is paused: idle workers poll.
"""

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from .client import Client, metric_total
from .process import Server


async def _stream(url: str, model: str, prompt: list[int], max_tokens: int) -> list[float]:
    """Arrival times of the tokens of one stream."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as client:
        stream = await client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return [time.perf_counter() async for chunk in stream if chunk.choices]


def decode_rate(url: str, streams: int, tokens: int, vocabulary: int = 1000) -> float:
    """Tokens per second of all streams together, after each has its first token."""
    model = Client(url).model()
    prompts = [[random.randrange(10, vocabulary) for _ in range(16)] for _ in range(streams)]

    async def run():
        return await asyncio.gather(*(_stream(url, model, prompt, tokens) for prompt in prompts))

    arrivals = asyncio.run(run())
    begin = max(times[0] for times in arrivals)
    end = max(times[-1] for times in arrivals)
    return sum(sum(t > begin for t in times) for times in arrivals) / (end - begin)


def prefill_rate(url: str, tokens: int, vocabulary: int = 1000) -> float:
    """Prompt tokens per second of one request that generates one token."""
    client = Client(url)
    prompt = [random.randrange(10, vocabulary) for _ in range(tokens)]
    begin = time.perf_counter()
    client.complete(prompt, max_tokens=1)
    return tokens / (time.perf_counter() - begin)


def disk_bytes(model: str) -> int:
    """Bytes of the safetensors files of a local checkpoint."""
    return sum(f.stat().st_size for f in Path(model).glob("*.safetensors"))


def resident_bytes(pid: int) -> int:
    """Proportional resident memory of a server's process tree (shared pages counted once)."""
    tree = [psutil.Process(pid)]
    tree += tree[0].children(recursive=True)
    return sum(process.memory_full_info().pss for process in tree)


def compare(
    models: dict[str, str],
    directory: Path,
    args: list[str],
    env: dict[str, str],
    rounds: int = 5,
    streams: tuple[int, ...] = (1, 8),
    decode_tokens: int = 64,
    prefill_tokens: int = 1024,
    progress: Callable[[str], None] = print,
) -> dict[str, dict]:
    """Serve every model at once and measure them in turn.

    Args:
        models: label to directory.
        directory: where the servers' logs go.
        args: further arguments of `vllm serve`, for every model.
        env: environment of every server.

    Returns label to {"decode": {streams: tokens/s}, "prefill": tokens/s, "disk", "resident", "quantized": bytes}.
    """
    with contextlib.ExitStack() as stack:
        servers = {}
        for label, model in models.items():
            progress(f"starting {label}")
            options = ["--no-enable-prefix-caching", *args]
            server = stack.enter_context(Server(model, directory / f"{label}.log", options, env))
            for n in streams:  # the first requests compile and allocate
                decode_rate(server.url, n, 8)
            prefill_rate(server.url, prefill_tokens)
            server.pause()
            servers[label] = server
        samples: dict[str, dict] = {label: {} for label in models}
        for i in range(rounds):
            for label, server in servers.items():
                progress(f"round {i + 1} of {rounds}: {label}")
                server.resume()
                for n in streams:
                    samples[label].setdefault(n, []).append(decode_rate(server.url, n, decode_tokens))
                samples[label].setdefault("prefill", []).append(prefill_rate(server.url, prefill_tokens))
                server.pause()
        for server in servers.values():
            server.resume()
        return {
            label: {
                "decode": {n: statistics.median(samples[label][n]) for n in streams},
                "prefill": statistics.median(samples[label]["prefill"]),
                "disk": disk_bytes(models[label]),
                "resident": resident_bytes(server.process.pid),
                "quantized": int(metric_total(Client(server.url).metrics(), "vllm_flute:quantized_weight_bytes")),
                "samples": {str(k): v for k, v in samples[label].items()},
            }
            for label, server in servers.items()
        }
