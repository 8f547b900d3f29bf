"""An HTTP proxy before an S3 server that breaks a share of the requests, in every way a network or a server can."""

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = (
    "refuse",  # closed before the server hears of the request
    "lose the answer",  # the server acts, the client never learns
    "cut the body",
    "change the body",
    "change the request",
    "500",
    "503",
    "SlowDown",
    "stall",
)
DRIP = "drip"
"""A body that comes a byte at a time, without end in sight; only where it is asked for."""
ERRORS = {"500": (500, "InternalError"), "503": (503, "ServiceUnavailable"), "SlowDown": (503, "SlowDown")}


class FaultProxy(ThreadingHTTPServer):
    """Forwards to `upstream`; `share` of the requests meet a fault of `faults`."""

    daemon_threads = True

    def __init__(self, upstream: str, share: float, faults: Sequence[str] = FAULTS, stall: float = 1.5) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = urlsplit(upstream)
        self.share, self.faults, self.stall = share, faults, stall
        self.random, self.bits, self.lock = random.Random(0), random.Random(1), threading.Lock()
        self.met: Counter[str] = Counter()
        self.requests = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self) -> str | None:
        """The fault the next request meets; the n-th one meets the same in each run, whatever the threads do."""
        with self.lock:
            self.requests += 1
            weights = [0.25 if fault == "stall" else 1.0 for fault in self.faults]  # a stall costs seconds
            (fault,) = self.random.choices(self.faults, weights) if self.random.random() < self.share else (None,)
            if fault:
                self.met[fault] += 1
            return fault

    def flipped(self, data: bytes) -> bytes:
        """The same with one bit changed, another one each time: damage that repeats itself is damage that is stored."""
        if not data:
            return data
        with self.lock:
            place, bit = self.bits.randrange(len(data)), self.bits.randrange(8)
        return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

    def handle_error(self, *_: object) -> None:
        """Clients hang up on us; that is what they are here for."""


class Handler(BaseHTTPRequestHandler):
    """One client connection."""

    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def _forward(self) -> None:
        fault = self.server.draw()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault == "refuse":
            return self._hang_up()
        if fault == "stall":
            time.sleep(self.server.stall)
            return self._hang_up()
        if fault in ERRORS:
            return self._error(*ERRORS[fault])
        if fault == "change the request" and self.command == "PUT" and body:
            body = self.server.flipped(body)
        status, headers, answer = self._ask(body)
        if fault == "lose the answer":
            return self._hang_up()
        if (
            fault == "change the body"
            and self.command == "GET"
            and status in (200, 206)
            and "list-type" not in self.path
        ):
            answer = self.server.flipped(answer) if "uploads" not in self.path else answer
        self._answer(status, headers, answer, cut=fault == "cut the body", drip=fault == DRIP)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(
            self.server.upstream.hostname or "", self.server.upstream.port, timeout=60
        )
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool, drip: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length", str(len(body)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        for place in range(len(body) if drip else 0):
            self.wfile.write(body[place : place + 1])
            time.sleep(0.05)
        if not drip:
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._hang_up()

    def _error(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>in the test</Message></Error>".encode()
        self._answer(status, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else body, cut=False)

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def proxy(upstream: str, share: float, faults: Sequence[str] = FAULTS, stall: float = 1.5) -> Iterator[FaultProxy]:
    """A running proxy."""
    server = FaultProxy(upstream, share, faults, stall)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
