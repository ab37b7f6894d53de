"""deploy/router/nginx.conf before two servers that answer as they are told."""

import contextlib
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from vllm_flute.errors import FluteError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from load_tests.load.router import nginx  # noqa: E402


class Replica(ThreadingHTTPServer):
    """Answers with ``status``, its own name and the bytes that it was sent; keeps what it saw."""

    def __init__(self, name: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.status, self.seen = name, 200, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(200, b"well")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.headers.get("Authorization"), len(body)))
        if self.path != "/stream":
            self.answer(self.server.status, self.server.name.encode())
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in (b"one", b"two"):
            self.wfile.write(b"3\r\n" + piece + b"\r\n")
            self.wfile.flush()
            time.sleep(1)
        self.wfile.write(b"0\r\n\r\n")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Connection", "close")  # no thread answers for a replica that is gone
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nginx")


@pytest.fixture
def service(work):
    """(nginx's URL, two replicas); a router of its own for each test, for it remembers who failed."""
    with contextlib.ExitStack() as stack:
        replicas = [Replica("first"), Replica("second")]
        for replica in replicas:
            stack.callback(replica.server_close)
            stack.callback(replica.shutdown)
        try:
            yield stack.enter_context(nginx(replicas[0].url, replicas[1].url, work)), replicas
        except FluteError as e:
            pytest.skip(str(e))


def test_both_replicas_get_requests_and_keys_pass(service):
    url, replicas = service
    names = {requests.post(url, data=b"x", headers={"Authorization": "Bearer k"}).text for _ in range(8)}
    assert names == {"first", "second"}
    assert {key for replica in replicas for key, _ in replica.seen} == {"Bearer k"}


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_replica_that_refuses_is_passed_over(service, status):
    url, (first, second) = service
    first.status = status
    answers = [requests.post(url, data=b"x" * 1000) for _ in range(6)]
    assert [(a.status_code, a.text) for a in answers] == [(200, "second")] * 6
    assert [size for _, size in second.seen] == [1000] * 6  # the whole body each time


def test_a_replica_that_is_gone_is_passed_over(service):
    url, (first, second) = service
    first.shutdown()
    first.server_close()
    assert {requests.post(url, data=b"x").text for _ in range(6)} == {"second"}


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_bad_request_is_not_repeated(service, status):
    url, replicas = service
    for replica in replicas:
        replica.status = status
    assert requests.post(url, data=b"x").status_code == status
    assert sum(len(replica.seen) for replica in replicas) == 1


def test_a_request_that_all_refuse_is_tried_twice(service):
    url, replicas = service
    for replica in replicas:
        replica.status = 503
    assert requests.post(url, data=b"x").status_code == 503
    assert sum(len(replica.seen) for replica in replicas) == 2


def test_an_oversize_body_stops_at_the_router(service):
    url, replicas = service
    assert requests.post(url, data=b"x" * (9 << 20)).status_code == 413
    assert not any(replica.seen for replica in replicas)


def test_pieces_of_a_stream_come_when_they_are_sent(service):
    url, _ = service
    begin = time.monotonic()
    with requests.post(f"{url}/stream", data=b"x", stream=True) as answer:
        arrived = [(piece, time.monotonic() - begin) for piece in answer.iter_content(chunk_size=None)]
    assert [piece for piece, _ in arrived] == [b"one", b"two"]
    assert arrived[0][1] < 0.9 < arrived[1][1]
