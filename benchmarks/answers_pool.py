"""The answers stage on 8 servers that each take 32 requests at a time, against the arithmetic limit 8 x 32 / latency.

The servers are one process with an event loop of bare sockets, so that they cost next to nothing; what is measured is
the whole stage: conversations, requests, journal, shards, commits. A target's answer takes seconds; at 50 ms the limit
is 5,120 answers a second, of which one Python process makes as many as its core allows. Goals: 90 % of the limit where
an answer takes 2 s, and 90 % of what this core makes at best (the highest rate of all latencies) at 50 ms.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._measure import result
from deepspec.data.answers import run_answers
from deepspec.data.prompts import run_prompts
from deepspec.recipe import load_run

SERVERS, IN_FLIGHT = 8, 32
LATENCIES = {2.0: 2048, 0.5: 8192, 0.05: 8192}  # seconds of an answer: conversations to answer


class Answering(asyncio.Protocol):
    """HTTP/1.1 as far as this benchmark needs it: one request at a time per connection, answered after `latency_s`."""

    latency_s = 0.05

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.heard = transport, b""

    def data_received(self, data: bytes) -> None:
        self.heard += data
        head, found, body = self.heard.partition(b"\r\n\r\n")
        if not found:
            return
        lengths = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        if len(body) < sum(lengths):
            return
        self.heard = b""
        if head.startswith(b"GET"):
            self.say({"object": "list", "data": [{"id": "demo", "object": "model", "created": 1, "owned_by": "vllm"}]})
        else:
            asyncio.get_running_loop().call_later(self.latency_s, self.say, ANSWER)

    def say(self, value: object) -> None:
        body = json.dumps(value).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)  # type: ignore[attr-defined]


ANSWER = {
    "id": "x", "object": "chat.completion", "created": 1, "model": "demo",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 200}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 30, "completion_tokens": 200, "total_tokens": 230},
}  # fmt: skip


async def serve(latency_s: float) -> None:
    Answering.latency_s = latency_s
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(Answering, "127.0.0.1", 0) for _ in range(SERVERS)]
    print(json.dumps([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1" for server in servers]), flush=True)
    await asyncio.Event().wait()


def rate(latency_s: float, count: int) -> float:
    """Answers per second of the stage."""
    server = subprocess.Popen([sys.executable, "-m", "benchmarks.answers_pool", str(latency_s)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        urls = server.stdout.readline()
        with tempfile.TemporaryDirectory(dir=".") as folder:
            source = Path(folder) / "prompts.jsonl"
            source.write_text("".join(json.dumps({"prompt": f"question {number} " * 20}) + "\n" for number in range(count)))
            files = json.dumps({"kind": "files", "paths": [str(source)]})
            settings = [f"prompts.source={files}", "prompts.limit=null", "answers.engine=openai", f"resources.endpoints={urls}"]
            settings += ["resources.served_model=demo", f"resources.endpoint_requests={IN_FLIGHT}", "resources.min_free_gb=0"]
            config = load_run("dspark-qwen3-4b", settings, store=str(Path(folder) / "store"))
            run_prompts(config)
            began = time.perf_counter()
            run_answers(config)
            return count / (time.perf_counter() - began)
    finally:
        server.kill()
        server.wait()


def main() -> dict[str, object]:
    rate(0.05, 512)  # imports, and the compiled parts of them
    rates = {latency_s: rate(latency_s, count) for latency_s, count in LATENCIES.items()}
    ratios = {f"limit at {latency_s:g} s": found * latency_s / (SERVERS * IN_FLIGHT) for latency_s, found in rates.items()}
    return result("answers_pool", ratios, {"limit at 2 s": 0.9}, answers_per_s={f"{key:g} s": round(found) for key, found in rates.items()})


if __name__ == "__main__":
    if len(sys.argv) == 2:
        asyncio.run(serve(float(sys.argv[1])))
    else:
        print(json.dumps(main()))
