"""Asking a vLLM server: the few endpoints that evaluation, benchmarks and tests need."""

import requests
from prometheus_client.parser import text_string_to_metric_families

from ..errors import FluteError


class Client:
    """A server at ``url`` that serves one model; ``key``: the API key that it asks for, if any."""

    def __init__(self, url: str, timeout: float = 600, key: str = ""):
        self.url, self.timeout = url.rstrip("/"), timeout
        self.session = requests.Session()
        if key:
            self.session.headers["Authorization"] = f"Bearer {key}"

    def post(self, path: str, body: dict) -> dict:
        """POST JSON, return JSON; FluteError with the server's own message where it refuses."""
        try:
            answer = self.session.post(self.url + path, json=body, timeout=self.timeout)
        except requests.RequestException as e:
            raise FluteError(f"{self.url}{path} does not answer: {e}") from None
        if not answer.ok:
            raise FluteError(f"{self.url}{path} answered {answer.status_code}: {answer.text[:300]}")
        return answer.json()

    def _card(self, key: str):
        try:
            return self.session.get(f"{self.url}/v1/models", timeout=self.timeout).json()["data"][0][key]
        except (requests.RequestException, KeyError, IndexError, ValueError) as e:
            raise FluteError(f"{self.url}/v1/models does not describe a model: {e}") from None

    def model(self) -> str:
        """Name of the served model."""
        return self._card("id")

    def context(self) -> int:
        """Tokens that the served model takes; vLLM alone says so."""
        return self._card("max_model_len")

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text by the server's own tokenizer."""
        return self.post("/tokenize", {"prompt": text, "add_special_tokens": special})["tokens"]

    def complete(self, prompt, max_tokens: int, **options) -> list[dict]:
        """Greedy ``/v1/completions`` choices for a text, a list of texts or token ids."""
        body = {"model": self.model(), "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return self.post("/v1/completions", body | options)["choices"]

    def metrics(self) -> dict[tuple[str, frozenset], float]:
        """Samples of /metrics by (name, label pairs)."""
        text = self.session.get(f"{self.url}/metrics", timeout=self.timeout).text
        return parse_metrics(text)


def parse_metrics(text: str) -> dict[tuple[str, frozenset], float]:
    """Samples of a /metrics page by (name, label pairs); ValueError where it is none."""
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def metric_total(samples: dict, name: str, **labels: str) -> float:
    """Sum of the samples of a metric whose labels include the given ones."""
    return sum(value for (n, have), value in samples.items() if n == name and labels.items() <= dict(have).items())
