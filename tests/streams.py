"""Many requests at once, and what became of each: nothing may be lost without a word."""

import asyncio
import json
from collections import Counter
from typing import NamedTuple

import aiohttp


class Outcome(NamedTuple):
    """kind: "answered" (all tokens), "failed" (the client was told: a status, an error event, a broken connection),
    "left" (the client closed it) or "lost" (it ended as if it were whole, or not at all)."""

    kind: str
    detail: str
    tokens: int = 0


async def ask(session: aiohttp.ClientSession, url: str, tokens: int, stream: bool, leave_after: int = 0) -> Outcome:
    """One completion of exactly ``tokens``; a stream is closed after ``leave_after`` events, where that is not 0."""
    body = {"model": "model", "prompt": "tell me more", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": stream} | ({"stream_options": {"include_usage": True}} if stream else {})
    try:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                return Outcome("failed", f"status {answer.status}: {(await answer.text())[:200]}")
            if not stream:
                got = (await answer.json())["usage"]["completion_tokens"]
                return Outcome("answered" if got == tokens else "lost", f"{got} of {tokens} tokens", got)
            events, got, error = 0, 0, ""
            async for line in answer.content:
                if line.strip() == b"data: [DONE]":
                    if error:
                        return Outcome("failed", f"error event: {error}", got)
                    return Outcome("answered" if got == tokens else "lost", f"{got} of {tokens} tokens", got)
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    error = error or str(event.get("error") or "")[:200]
                    got = (event.get("usage") or {}).get("completion_tokens", got)
                    events += 1
                    if events == leave_after:
                        return Outcome("left", "")
            return Outcome("failed" if error else "lost", error or "ended without [DONE]", got)
    except (TimeoutError, json.JSONDecodeError) as e:
        return Outcome("lost", f"{type(e).__name__}: {e}")
    except aiohttp.ClientError as e:
        return Outcome("failed", f"{type(e).__name__}: {e}")


def start(
    url: str, count: int, tokens: int, *, streams: float = 0, leave_after: int = 0, key: str = "", limit: int = 300
):
    """A task of ``count`` requests at once, of which the share ``streams`` is streamed; gives their outcomes.

    Args:
        leave_after: streams are closed after so many events; 0: read to their end.
        limit: seconds after which a request counts as lost.
    """

    async def run() -> list[Outcome]:
        timeout = aiohttp.ClientTimeout(total=limit)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, headers=headers, connector=connector) as session:
            tasks = (ask(session, url, tokens, i < streams * count, leave_after) for i in range(count))
            return await asyncio.gather(*tasks)

    return asyncio.create_task(run())


def send(url: str, count: int, tokens: int, **options) -> list[Outcome]:
    """The same, waited for."""

    async def run():
        return await start(url, count, tokens, **options)

    return asyncio.run(run())


def figures(outcomes: list[Outcome]) -> dict[str, int]:
    """{"sent", "answered", "failed", "left", "lost"}."""
    count = Counter(outcome.kind for outcome in outcomes)
    return {"sent": len(outcomes)} | {kind: count[kind] for kind in ("answered", "failed", "left", "lost")}
