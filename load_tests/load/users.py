"""locust's users: those who chat, those who leave in the middle, those who read slowly.

Environment: LOAD_MODEL (the served model), LOAD_RECORD (the file that takes what became of each request) and, where
the server wants a key, OPENAI_API_KEY.
"""

import json
import os
import random
import time
from pathlib import Path

from gevent import GreenletExit
from locust import HttpUser, between, task

from load_tests.load.records import Request, append

WORDS = ("river", "table", "window", "orange", "music", "winter", "paper", "garden", "silver", "engine", "planet")


def words(count: int) -> str:
    return " ".join(random.choice(WORDS) for _ in range(count))


class Streaming(HttpUser):
    """A user whose requests are streamed, timed and recorded."""

    abstract = True

    def on_start(self) -> None:
        self.record = Path(os.environ["LOAD_RECORD"])
        if key := os.environ.get("OPENAI_API_KEY"):
            self.client.headers["Authorization"] = f"Bearer {key}"

    def stream(self, messages: list[dict], tokens: int, leave_after: int = 0, pause: float = 0) -> str:
        """One chat completion of so many tokens.

        Args:
            leave_after: close the connection after so many pieces; 0: read to the end.
            pause: seconds of waiting after each piece.
        """
        body = {"model": os.environ["LOAD_MODEL"], "messages": messages, "max_tokens": tokens, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
        append(self.record, "sent")
        request = Request(time.monotonic(), "failed", error="the stream ended without [DONE]", paced=bool(pause))
        text, last, pieces = "", request.start, 0
        try:
            with self.client.post(
                "/v1/chat/completions", json=body, stream=True, timeout=300, catch_response=True
            ) as answer:
                if answer.status_code != 200:
                    request.error = f"{answer.status_code} {answer.text[:200]}"
                    answer.failure(request.error)
                    return ""
                for line in answer.iter_lines(chunk_size=None):
                    if not line.startswith(b"data: "):
                        continue
                    if line == b"data: [DONE]":
                        request.outcome, request.error = "answered", ""
                        break
                    event = json.loads(line[6:])
                    if "error" in event:
                        request.error = str(event["error"])[:200]
                        break
                    if usage := event.get("usage"):
                        request.tokens, request.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
                    if not event["choices"] or "role" in event["choices"][0]["delta"]:
                        continue  # the usage, and the message's opening, carry no token
                    now = time.monotonic()
                    if request.ttft is None:
                        request.ttft = now - request.start
                    else:
                        request.itls.append(now - last)
                    last, pieces = now, pieces + 1
                    text += event["choices"][0]["delta"].get("content") or ""
                    if pieces == leave_after:
                        request.outcome, request.error, request.tokens = "cancelled", "", pieces
                        break
                    if pause:
                        time.sleep(pause)
                answer.close()  # what is left of the stream is not read
                if request.outcome == "answered" and request.tokens != tokens:
                    request.outcome, request.error = "failed", f"{request.tokens} of {tokens} tokens arrived"
                if request.outcome == "failed":
                    answer.failure(request.error)
        except GreenletExit:  # the run is over, and its users with it
            request.outcome, request.error, request.tokens = "cancelled", "", pieces
            raise
        except Exception as e:  # locust goes on with the next task; the record keeps what happened
            request.error = f"{type(e).__name__}: {e}"
        finally:
            append(self.record, request)
        return text


class Chatter(Streaming):
    """Turns of a conversation, each with all before it, with time to think; then a new conversation."""

    weight = 6
    wait_time = between(0.5, 2)

    @task
    def conversation(self) -> None:
        messages = []
        for _ in range(random.randint(2, 4)):
            messages.append({"role": "user", "content": f"Tell me about {words(random.randint(5, 40))}."})
            answer = self.stream(messages, random.choice([24, 48, 96]))
            if not answer:
                return
            messages.append({"role": "assistant", "content": answer})
            self.wait()


class Leaver(Streaming):
    """Asks for much and closes the connection after a few tokens."""

    weight = 2
    wait_time = between(0, 0.5)

    @task
    def leave(self) -> None:
        messages = [{"role": "user", "content": words(random.randint(20, 200))}]
        self.stream(messages, 512, leave_after=random.randint(1, 20))


class SlowReader(Streaming):
    """Long streams, read slower than they come."""

    weight = 2
    wait_time = between(0, 0.5)

    @task
    def read(self) -> None:
        messages = [{"role": "user", "content": words(random.randint(20, 100))}]
        self.stream(messages, 256, pause=0.1)
