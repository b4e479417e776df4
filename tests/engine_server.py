"""A scripted serving engine: what an evaluation reads of one, counters included, and every way of
not giving it.

PORT MODEL FOLDER [--speculative-config JSON]; where the file `dies` lies in FOLDER it is removed,
and the server ends by itself after a few requests.
"""

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BLOCK = 3  # tokens proposed per round, of which 2 are accepted


def answer_to(prompt: list[int], limit: int, stop: int) -> list[int]:
    """The tokens that the scripted target answers a prompt with."""
    length = 2 + sum(prompt) % 7
    ids = [10 + (sum(prompt) * 7 + 13 * place) % 100 for place in range(length)]
    return [*ids, stop][:limit]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "EngineServer"

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        wrong = self.server.wrong
        match self.path:
            case "/health":
                self.send(200, {})
            case "/version" if "version" not in wrong:
                self.send(200, {"version": self.server.version})
            case "/v1/models":
                name = "another" if "model" in wrong else self.server.model
                self.send(200, {"data": [{"id": name, "max_model_len": self.server.max_len}]})
            case "/metrics" if "metrics" not in wrong:
                self.raw(200, self.server.metrics().encode(), kind="text/plain")
            case _:
                self.send(404, {"error": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, wrong = self.server, self.server.wrong
        given = self.headers.get("Authorization", "")
        if server.key and given != f"Bearer {server.key}":
            return self.send(401, {"error": {"message": f"Incorrect API key provided: {given}"}})
        with server.lock:
            server.bodies.append(body)
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            failing = server.failures.pop() if server.failures else 0
        time.sleep(server.latency_s)
        prompt = server.tokenizer.apply_chat_template(
            body["messages"],
            add_generation_prompt=True,
            return_dict=False,
            **body["chat_template_kwargs"],
        )
        shown = [*prompt[:-1], 7] if "template" in wrong else prompt
        ids = answer_to(prompt, body["max_tokens"], body["stop_token_ids"][0])
        if "answers" in wrong and len(ids) > 1:
            ids[0] += 1
        with server.lock:
            server.in_flight -= 1
            if not failing:
                server.count(ids, twice="others" in wrong)
        if failing:
            return self.send(failing, {"error": {"message": f"status {failing}"}})
        tokens = {} if "tokens" in wrong else {"token_ids": ids}
        choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, **tokens}
        self.send(200, {"choices": [choice], "prompt_token_ids": shown})

    def send(self, status: int, value: object) -> None:
        self.raw(status, json.dumps(value).encode())

    def raw(self, status: int, data: bytes, *, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class EngineServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self,
        folder: str,
        *,
        model: str = "demo",
        drafts: bool = False,
        wrong: frozenset[str] = frozenset(),
        latency_s: float = 0.0,
        port: int = 0,
    ) -> None:
        from transformers import AutoTokenizer

        super().__init__(("127.0.0.1", port), Handler)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model, self.drafts, self.wrong, self.latency_s = model, drafts, wrong, latency_s
        self.version, self.max_len, self.key = "0.32.0", 512, ""
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.failures: list[int] = []  # statuses of the next requests
        self.in_flight = self.most_in_flight = 0
        self.counters = Counter[str]()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *args: object) -> None: ...

    def count(self, ids: list[int], *, twice: bool) -> None:
        self.counters["requests"] += 2 if twice else 1
        self.counters["drafts"] += -(-(len(ids) - 1) // 3)

    def metrics(self) -> str:
        requests, drafts = self.counters["requests"], self.counters["drafts"]
        lines = [
            f'vllm:request_success_total{{engine="0",finished_reason="stop"}} {float(requests)}',
            'vllm:request_success_total{engine="0",finished_reason="length"} 0.0',
        ]
        if self.drafts:
            at = 'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position='
            lines += [
                f'vllm:spec_decode_num_drafts_total{{engine="0"}} {float(drafts)}',
                f'vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {float(BLOCK * drafts)}',
                *(f'{at}"{place}"}} {float(drafts * (place < 2))}' for place in range(BLOCK)),
            ]
        return "".join(f"{line}\n" for line in lines)


@contextmanager
def engine_server(folder: str, **settings: Any) -> Iterator[EngineServer]:
    with EngineServer(folder, **settings) as server:
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        try:
            yield server
        finally:
            server.shutdown()


if __name__ == "__main__":
    port, model, folder, *options = sys.argv[1:]
    with EngineServer(
        folder, model=model, drafts="--speculative-config" in options, port=int(port)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        dies = Path(folder, "dies")
        while len(server.bodies) < 4 or not dies.exists():
            time.sleep(0.01)
        dies.unlink()
