"""The answers stage on 8 servers that each take 32 requests at a time, against the arithmetic limit
8 x 32 / latency.

The servers are one process with an event loop of bare sockets, so that they cost next to nothing;
what is measured is the whole stage: conversations, requests, journal, shards, commits. A target's
answer takes seconds; at 50 ms the limit is 5,120 answers a second, of which one Python process
makes as many as its core allows. Goals: 90 % of the limit where an answer takes 2 s, and memory
that does not grow with the number of conversations.
"""

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._measure import peak_bytes, result
from deepspec.answers.stage import run_answers
from deepspec.artifacts.run import Run
from deepspec.config.recipes import load_run
from deepspec.demo.target import train_tokenizer
from deepspec.prompts.stage import run_prompts

SERVERS, IN_FLIGHT = 8, 32
LATENCIES = {2.0: 2048, 0.5: 8192, 0.05: 8192}  # seconds of an answer: conversations to answer
GOALS = {"limit at 2 s": 0.9, "peak of 2,048/of 16,384": 0.9}


class Answering(asyncio.Protocol):
    """HTTP/1.1 as far as this benchmark needs it: one request at a time per connection,
    answered after `latency_s` on average.
    """

    latency_s = 0.05

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.heard = transport, b""

    def data_received(self, data: bytes) -> None:
        self.heard += data
        head, found, body = self.heard.partition(b"\r\n\r\n")
        if not found:
            return
        lengths = [
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        ]
        if len(body) < sum(lengths):
            return
        self.heard = b""
        if head.startswith(b"GET"):
            self.say(
                {
                    "object": "list",
                    "data": [{"id": "demo", "object": "model", "created": 1, "owned_by": "vllm"}],
                }
            )
        else:
            asyncio.get_running_loop().call_later(
                self.latency_s * random.uniform(0.5, 1.5), self.say, ANSWER
            )

    def say(self, value: object) -> None:
        body = json.dumps(value).encode()
        head = (
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)  # type: ignore[attr-defined]


ANSWER = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": "demo",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "word " * 200},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 30, "completion_tokens": 200, "total_tokens": 230},
}


async def serve(latency_s: float) -> None:
    Answering.latency_s = latency_s
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(Answering, "127.0.0.1", 0) for _ in range(SERVERS)]
    print(
        json.dumps(
            [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1" for server in servers]
        ),
        flush=True,
    )
    await asyncio.Event().wait()


def answer(folder: Path, urls: str, count: int) -> None:
    """The stage over `count` conversations; prints its answers per second amid the run and this
    process's peak memory in bytes.
    """
    source = folder / "prompts.jsonl"
    with source.open("w") as lines:
        lines.writelines(
            json.dumps({"prompt": f"question {number} " * 20}) + "\n" for number in range(count)
        )
    texts = [f"question {number} ###" for number in range(100)]
    train_tokenizer(texts, vocab_size=512).save_pretrained(folder / "target")
    files = json.dumps({"kind": "files", "paths": [str(source)]})
    settings = [
        f"prompts.source={files}",
        "prompts.limit=null",
        "answers.engine=openai",
        f"resources.servers.endpoints={urls}",
    ]
    settings += [
        f"target.model={folder / 'target'}",
        "resources.servers.model_name=demo",
        # these read 30 tokens whatever they are sent
        "resources.servers.max_differing_prompts=1",
        f"resources.servers.requests={IN_FLIGHT}",
        "resources.storage.min_free_gb=0",
        "resources.servers.progress_s=0.05",
    ]
    config = load_run("dspark-qwen3-4b", settings, store=str(folder / "store"))
    run_prompts(Run(config))
    seen: list[tuple[float, int]] = []
    run_answers(
        Run(config),
        report=lambda event: (
            seen.append((time.perf_counter(), event["rows"]))
            if event["event"] == "answering"
            else None
        ),
    )
    # Beginning and end, when the servers are not all busy yet or any more, are as long in a run of
    # a day as in one of seconds.
    amid = [(at, rows) for at, rows in seen if 0.1 * count <= rows <= 0.85 * count]
    print(json.dumps([(amid[-1][1] - amid[0][1]) / (amid[-1][0] - amid[0][0]), peak_bytes()]))


def measure(latency_s: float, count: int) -> tuple[float, int]:
    """Answers per second of the stage, and its peak memory in bytes; servers and stage in
    processes of their own.
    """
    command = [sys.executable, "-m", "benchmarks.answers_pool"]
    server = subprocess.Popen([*command, str(latency_s)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        urls = server.stdout.readline().strip()
        with tempfile.TemporaryDirectory(dir=".") as folder:
            done = subprocess.run(
                [*command, folder, urls, str(count)], check=True, stdout=subprocess.PIPE, text=True
            )
    finally:
        server.kill()
        server.wait()
    rate, peak = json.loads(done.stdout.splitlines()[-1])
    return rate, peak


def main() -> dict[str, object]:
    found = {latency_s: measure(latency_s, count) for latency_s, count in LATENCIES.items()}
    ratios = {
        f"limit at {latency_s:g} s": rate * latency_s / (SERVERS * IN_FLIGHT)
        for latency_s, (rate, _) in found.items()
    }
    ratios["peak of 2,048/of 16,384"] = measure(0.05, 2048)[1] / measure(0.05, 16384)[1]
    rates = {f"{latency_s:g} s": round(rate) for latency_s, (rate, _) in found.items()}
    return result("answers_pool", ratios, GOALS, answers_per_s=rates)


if __name__ == "__main__":
    match sys.argv[1:]:
        case [latency_s]:
            asyncio.run(serve(float(latency_s)))
        case [folder, urls, count]:
            answer(Path(folder), urls, int(count))
        case _:
            print(json.dumps(main()))
