"""A proxy in front of an S3 server that spoils the requests a test asks it to, and hands on all
others unchanged.

with FaultyProxy(server.port) as proxy:
    proxy.fault = once(answer(503, "SlowDown"), when=lambda request: request.method == "PUT")
"""

import contextlib
import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import NamedTuple, Self


class Request(NamedTuple):
    method: str
    path: str
    body: bytes


class Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    cut: int | None = None  # bytes of the body that get through before the connection closes


Forward = Callable[[bytes], Answer]
Fault = Callable[[Request, Forward], Answer | None]  # None: the connection closes without an answer


def pass_on(request: Request, forward: Forward) -> Answer:
    return forward(request.body)


def answer(status: int, code: str) -> Fault:
    """The server's own word for what is wrong, the request never reaches it."""
    error = f"<Error><Code>{code}</Code><Message>scripted</Message></Error>"
    body = f"<?xml version='1.0'?>{error}".encode()
    return lambda request, forward: Answer(status, [("Content-Type", "application/xml")], body)


def cut_body(request: Request, forward: Forward) -> Answer:
    """Half of the answer's body arrives, then the connection closes."""
    whole = forward(request.body)
    return whole._replace(cut=len(whole.body) // 2)


def lose_answer(request: Request, forward: Forward) -> None:
    """The server does what was asked, its answer never arrives."""
    forward(request.body)


def flip_byte(request: Request, forward: Forward) -> Answer:
    """One bit of the request's body changes on the way."""
    return forward(bytes([request.body[0] ^ 1]) + request.body[1:])


def times(count: int, fault: Fault, *, when: Callable[[Request], bool]) -> Fault:
    """`fault` for the first `count` requests of that kind, none for the rest."""
    lock, left = threading.Lock(), [count]

    def chosen(request: Request, forward: Forward) -> Answer | None:
        with lock:
            hit = left[0] > 0 and when(request)
            left[0] -= hit
        return (fault if hit else pass_on)(request, forward)

    return chosen


class FaultyProxy:
    def __init__(self, port: int) -> None:
        self.fault: Fault = pass_on
        self.seen: list[Request] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, port))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.server.server_close()


def _handler(proxy: FaultyProxy, port: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def handle_any(self) -> None:
            request = Request(
                self.command,
                self.path,
                self.rfile.read(int(self.headers.get("Content-Length") or 0)),
            )
            proxy.seen.append(request)
            answered = proxy.fault(request, self.forward)
            if answered is None:
                self.close_connection = True
                return
            self.send_response(answered.status)
            for name, value in answered.headers:
                if name.lower() not in (
                    "content-length",
                    "connection",
                    "transfer-encoding",
                    "date",
                    "server",
                ):
                    self.send_header(name, value)
            length = dict((name.lower(), value) for name, value in answered.headers).get(
                "content-length"
            )
            self.send_header(
                "Content-Length",
                length if self.command == "HEAD" and length else str(len(answered.body)),
            )
            with contextlib.suppress(ConnectionError):
                self.end_headers()
            body = b"" if self.command == "HEAD" else answered.body
            with contextlib.suppress(ConnectionError):  # the client may be gone
                self.wfile.write(body if answered.cut is None else body[: answered.cut])
            self.close_connection = answered.cut is not None

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

        def forward(self, body: bytes) -> Answer:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            headers = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in ("connection", "expect")
            }
            connection.request(self.command, self.path, body=body, headers=headers)
            got = connection.getresponse()
            answered = Answer(got.status, got.getheaders(), got.read())
            connection.close()
            return answered

    return Handler
