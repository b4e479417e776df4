"""Speculative against plain decoding of the demo target: batch 1 prompt by prompt, and batch 8, outputs compared.

Needs the demo's store (`make demo` first). Goals: DSpark at least 1.2 x plain at batch 1.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time

import torch

from deepspec.config import SamplingConfig
from deepspec.eval.benchmarks import load_benchmarks, render
from deepspec.eval.run import load_models
from deepspec.eval.speculate import speculate
from deepspec.generate import Decode, generate
from deepspec.lineage import artifact_of
from deepspec.recipe import load_run

ROUNDS, BATCH = 3, 8
GOALS = {"speculative/plain at batch 1": 1.2}


def main(run: str = "demo", *overrides: str) -> dict[str, object]:
    config = load_run(run, overrides)
    torch.set_num_threads(config.resources.evaluate_threads or torch.get_num_threads())
    models = load_models(config, artifact_of(config, "train"))
    settings = Decode(SamplingConfig(temperature=0), config.evaluate.max_new_tokens, models.stop_ids)
    prompts = [render(models.chat, text).input_ids for benchmark in load_benchmarks(config) for text in benchmark.prompts]
    seconds: dict[str, list[float]] = {"plain 1": [], "speculative 1": [], "plain batch": [], "speculative batch": []}
    tokens = dict.fromkeys(seconds, 0)

    def measure(name: str, batch: list[list[int]]) -> list[list[int]]:
        started, seeds = time.perf_counter(), [0] * len(batch)
        if name.startswith("plain"):
            answers = generate(models.target, batch, settings, seeds=seeds)
        else:
            answers = [trace.token_ids for trace in speculate(models.target, models.draft, batch, settings, seeds=seeds)[0]]
        seconds[name][-1] += time.perf_counter() - started
        tokens[name] += sum(map(len, answers))
        return answers

    speculate(models.target, models.draft, prompts[:1], settings, seeds=[0])
    for _ in range(ROUNDS):
        for sides, size in ((("plain 1", "speculative 1"), 1), (("plain batch", "speculative batch"), BATCH)):
            for name in sides:
                seconds[name].append(0.0)
            for number, start in enumerate(range(0, len(prompts), size)):
                batch = prompts[start : start + size]
                answers = [measure(name, batch) for name in (sides if number % 2 == 0 else sides[::-1])]
                assert answers[0] == answers[1], "speculative decoding changed an answer"
    rate = {name: tokens[name] / ROUNDS / statistics.median(seconds[name]) for name in seconds}
    ratios = {
        "speculative/plain at batch 1": rate["speculative 1"] / rate["plain 1"],
        f"speculative/plain at batch {BATCH}": rate["speculative batch"] / rate["plain batch"],
        f"speculative batch {BATCH}/batch 1": rate["speculative batch"] / rate["speculative 1"],
    }
    ok = all(ratios[name] >= goal for name, goal in GOALS.items())
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    return {"name": "decoding", "ratios": ratios, "goals": GOALS, "ok": ok, "tokens_per_s": rate, "machine": machine}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
