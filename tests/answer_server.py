"""A scripted OpenAI-compatible server: answers that can be foreseen, and every way of not
giving one.
"""

import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# (request body, how often this conversation was asked here before) -> what to do
Plan = Callable[[dict[str, Any], int], str]


def always(what: str) -> Plan:
    return lambda body, before: what


ANSWERS = always("answer")


def _choice(**changes: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The answer with something else in its choice, or (what the choice does not have) in its
    message.
    """

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        (choice,) = answer["choices"]
        inside = {key: value for key, value in changes.items() if key not in choice}
        message = {**choice["message"], **inside}
        return {
            **answer,
            "choices": [
                {
                    **choice,
                    "message": message,
                    **{key: changes[key] for key in changes if key in choice},
                }
            ],
        }

    return change


ODD: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "reason": _choice(reasoning_content="hm"),
    "cut thought": _choice(content=None, reasoning="hm, so", finish_reason="length"),
    "parts": _choice(content=[{"text": "cba"}]),
    "no message": _choice(message="cba"),
    "half a character": _choice(content="x\ud83d"),
    "no counts": lambda answer: {**answer, "usage": {}},
    "no choices": lambda answer: {**answer, "choices": []},
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "AnswerServer"

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        if self.refuses_key():
            return
        model = {"object": "model", "created": 1, "owned_by": self.server.owner}
        if self.server.max_model_len is not None:
            model["max_model_len"] = self.server.max_model_len
        listed = [{"id": name, **model} for name in self.server.models]
        self.send(200, {"object": "list", "data": listed})

    def refuses_key(self) -> bool:
        wanted, given = self.server.key, self.headers.get("Authorization", "")
        if wanted and given != f"Bearer {wanted}":
            self.send(401, {"error": {"message": f"Incorrect API key provided: {given}"}})
            return True
        return False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refuses_key():
            return
        asked = json.dumps(body["messages"])
        with self.server.lock:
            before = self.server.asked[asked]
            self.server.asked[asked] += 1
            self.server.bodies.append(body)
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        try:
            time.sleep(random.uniform(0, 2 * self.server.latency_s))
            self.act(self.server.plan(body, before), body)
        finally:
            with self.server.lock:
                self.server.in_flight -= 1

    def act(self, what: str, body: dict[str, Any]) -> None:
        text = body["messages"][-1]["content"][::-1]
        message: dict[str, Any] = {"role": "assistant", "content": text}
        answer = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "message": message,
                    "finish_reason": "length" if what == "truncate" else "stop",
                }
            ],
            "usage": {"completion_tokens": 5},
        }
        if self.server.reads is not None:
            prompt = self.server.reads(body)
            answer["usage"]["prompt_tokens"] = len(prompt)
            if body.get("return_token_ids"):
                answer["prompt_token_ids"] = prompt
        match what:
            case "answer" | "truncate" | "slow":
                time.sleep(1.0 if what == "slow" else 0.0)
                self.send(200, answer)
            case _ if what in ODD:
                self.send(200, ODD[what](answer))
            case "bad json":
                self.raw(200, b'{"id": "x", ')
            case "not json":
                self.raw(200, b"<html>", kind="text/html")
            case "hang up":
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"id": ')
                self.close_connection = True
            case "gone":
                self.close_connection = True
            case "hang":
                time.sleep(3)
                self.close_connection = True
            case _:  # a status, perhaps with seconds to wait
                status, _, seconds = what.partition(" ")
                self.send(
                    int(status),
                    {"error": {"message": f"status {status}"}},
                    **({"Retry-After": seconds} if seconds else {}),
                )

    def send(self, status: int, value: object, **headers: str) -> None:
        self.raw(status, json.dumps(value).encode(), **headers)

    def raw(
        self, status: int, data: bytes, *, kind: str = "application/json", **headers: str
    ) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


class AnswerServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(
        self,
        plan: Plan,
        *,
        models: tuple[str, ...],
        key: str | None,
        latency_s: float,
        port: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.plan, self.models, self.key, self.latency_s = plan, models, key, latency_s
        self.owner = "somebody"
        self.max_model_len: int | None = None
        # the prompt's token ids of a request, where it reports anything about prompts
        self.reads: Callable[[dict[str, Any]], list[int]] | None = None
        self.lock, self.asked, self.bodies = (
            threading.Lock(),
            Counter[str](),
            list[dict[str, Any]](),
        )
        self.in_flight = self.most_in_flight = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *args: object) -> None: ...  # a client that was killed


@contextmanager
def answer_server(
    plan: Plan = ANSWERS,
    *,
    models: tuple[str, ...] = ("demo",),
    key: str | None = None,
    latency_s: float = 0.0,
    port: int = 0,
) -> Iterator[AnswerServer]:
    with AnswerServer(plan, models=models, key=key, latency_s=latency_s, port=port) as server:
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        try:
            yield server
        finally:
            server.shutdown()


def answer_or_hang(body: dict[str, Any], before: int) -> str:
    return "hang" if body["messages"][-1]["content"].startswith("wait for ever") else "answer"


# PORT MODEL [DIES_AFTER]: ends by itself, without a word, when it has been asked so often
if __name__ == "__main__":
    port, model, *dies_after = sys.argv[1:]
    with AnswerServer(
        answer_or_hang, models=(model,), key=None, latency_s=0.02, port=int(port)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        while not dies_after or len(server.bodies) < int(dies_after[0]):
            time.sleep(0.01)
