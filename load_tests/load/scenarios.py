"""The kinds of load. Each sends its requests and returns (requests, how many were sent)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import bench, mix
from .records import Request
from .target import Target

PROMPT, ANSWER = 128, 64  # tokens of a chat-sized request: what rates and the knee are counted in


@dataclass(frozen=True)
class Scenario:
    """``run(target, rate, seconds, out)``; rate: chat-sized requests per second that the server is to bear."""

    name: str
    what: str
    run: Callable[[Target, float, float, Path], tuple[list[Request], int]]


def random_prompts(prompt: int, answer: int) -> list[str]:
    """Options for prompts of random tokens, three quarters to five quarters of the length."""
    lengths = ["--random-input-len", str(prompt), "--random-output-len", str(answer)]
    return ["--dataset-name", "random", *lengths, "--random-range-ratio", '{"input": 0.25, "output": 0}']


def at_rate(target: Target, rate: float, seconds: float, out: Path, burstiness: float = 1) -> tuple:
    """Chat-sized requests; arrivals are a gamma process, burstiness 1 a Poisson process, less is burstier."""
    arrivals = ["--request-rate", str(rate), "--burstiness", str(burstiness)]
    count = max(8, round(rate * seconds))
    return bench.run(target, [*random_prompts(PROMPT, ANSWER), *arrivals], count, ANSWER, out)


def steady(target: Target, rate: float, seconds: float, out: Path) -> tuple:
    return at_rate(target, 0.7 * rate, seconds, out)


def bursts(target: Target, rate: float, seconds: float, out: Path) -> tuple:
    return at_rate(target, 0.5 * rate, seconds, out, burstiness=0.1)


def closed(options: list[str], prompt: int, answer: int, at_once: int) -> Callable:
    """So many at once, each followed by the next: as many in all as take about the time at the given rate."""

    def run(target: Target, rate: float, seconds: float, out: Path) -> tuple:
        # A prompt's token is cheaper than one of an answer; an eighth is near enough to choose a number of requests.
        cost = (prompt / 8 + answer) / (PROMPT / 8 + ANSWER)
        count = max(2 * at_once, round(rate / cost * seconds))
        return bench.run(target, [*options, "--max-concurrency", str(at_once)], count, answer, out)

    return run


PREFIX = ["--dataset-name", "prefix_repetition", "--prefix-repetition-prefix-len", "512"]
PREFIX += ["--prefix-repetition-suffix-len", "64", "--prefix-repetition-num-prefixes", "4"]
PREFIX += ["--prefix-repetition-output-len", str(ANSWER)]

SCENARIOS = (
    Scenario("steady", f"chat-sized requests ({PROMPT} in, {ANSWER} out), Poisson arrivals at 70% of the rate", steady),
    Scenario("bursts", "the same in bursts (gamma arrivals of shape 0.1) at 50% of the rate", bursts),
    Scenario("prefill", "1024 tokens in, 8 out, 4 at once", closed(random_prompts(1024, 8), 1024, 8, 4)),
    Scenario("prefix", "512 shared tokens of 4 kinds, 64 own, 64 out, 8 at once", closed(PREFIX, 64, ANSWER, 8)),
    Scenario("slow-readers", "streams of 256 tokens, read a piece at a time", mix.run("SlowReader", 8)),
    Scenario("cancelled", "streams that their client leaves after a few tokens", mix.run("Leaver", 8)),
    Scenario("users", "people who chat, some who leave, some who read slowly, together", mix.run("", 12)),
)
