"""Decoding of a random target of Qwen3-4B's shape, plainly and with a random draft: the same
tokens, and what a token and a round cost.
"""

import torch

from benchmarks.gpu_check.random_models import random_draft, random_target, recipe
from benchmarks.gpu_check.section import Bench
from deepspec.config.data import SamplingConfig
from deepspec.evaluate.speculate import speculate
from deepspec.model.drafter import Drafter
from deepspec.target.generate import Decode, generate
from deepspec.target.model import Target

FEW_LAYERS = 6  # of the target whose tokens are compared in float32
TIMED = [(1, 0.0), (1, 1.0), (8, 0.0), (32, 0.0)]  # batch sizes and temperatures
NEW_TOKENS, ANSWER_ROWS = 24, 64
PROMPT_TOKENS = 200


def check(bench: Bench) -> None:
    layer_ids = recipe(bench).target.layer_ids
    with bench.part("float32: the same tokens"):
        few = None if bench.rehearse else FEW_LAYERS
        ids = layer_ids if bench.rehearse else [-1, 1, 2, 3, 4]
        same_tokens(bench, random_target(bench, torch.float32, ids, num_layers=few))
    with bench.part("bfloat16: speed"):
        target = random_target(bench, torch.bfloat16, layer_ids)
        draft = random_draft(bench, target)
        for batch, temperature in TIMED[:2] if bench.rehearse else TIMED:
            speed(bench, target, draft, batch, temperature)
        answers(bench, target)


def prompts(bench: Bench, target: Target, count: int) -> list[list[int]]:
    """Of unequal lengths, so that rows are padded."""
    longest = 12 if bench.rehearse else PROMPT_TOKENS
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(target.text_config.vocab_size, (count, longest), generator=random)
    return [row[: longest - number % 9].tolist() for number, row in enumerate(ids)]


def decode(bench: Bench, batch: int, temperature: float) -> Decode:
    new_tokens = 8 if bench.rehearse else NEW_TOKENS
    return Decode(SamplingConfig(temperature=temperature), new_tokens, frozenset(), batch)


def same_tokens(bench: Bench, target: Target) -> None:
    draft, asked = random_draft(bench, target), prompts(bench, target, 5)
    for batch in (1, 3):
        settings = decode(bench, batch, 0.0)
        plain = generate(target, asked, settings, seeds=range(5))
        traces, _ = speculate(target, draft, asked, settings, seeds=range(5))
        same = [trace.token_ids == answer for trace, answer in zip(traces, plain, strict=True)]
        what = f"float32, batch {batch}: the same tokens"
        bench.findings.check(what, all(same), f"{sum(same)} of {len(same)}")
    again = generate(target, asked, decode(bench, 5, 1.0), seeds=range(5))
    alone = generate(target, asked, decode(bench, 1, 1.0), seeds=range(5))
    what = "float32, temperature 1: a row's tokens do not depend on its batch"
    bench.findings.check(what, again == alone)


def speed(bench: Bench, target: Target, draft: Drafter, batch: int, temperature: float) -> None:
    """Milliseconds a pass, waits and kernels; the random draft has next to nothing accepted."""
    asked, settings = prompts(bench, target, batch), decode(bench, batch, temperature)
    seeds = range(batch)

    def plainly() -> int:
        return max(map(len, generate(target, asked, settings, seeds=seeds)))

    def speculatively() -> int:
        traces, _ = speculate(target, draft, asked, settings, seeds=seeds)
        return max(len(trace.proposed) for trace in traces)

    for name, side in (("token", plainly), ("round", speculatively)):
        what = f"bfloat16, batch {batch}, temperature {temperature:g}, a {name}"
        rounds = side()  # with the prompts' own pass, which is small beside them
        taken = bench.seconds(side, rounds=1)
        bench.findings.check(f"{what}: tokens were made", rounds > 0, rounds)
        bench.findings.figure(f"{what}: ms", 1e3 * taken / rounds)
        bench.findings.figure(f"{what}: waits", bench.num_waits(side) / rounds)
        if (batch, temperature) == TIMED[0] and not bench.rehearse:
            bench.findings.figure(f"{what}: launches", num_launches(side) / rounds)


def num_launches(work) -> int:
    """Kernels and graphs that the host launches while `work` runs."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        work()
    return sum(
        event.count
        for event in profiler.key_averages()
        if "LaunchKernel" in event.key or "GraphLaunch" in event.key
    )


def answers(bench: Bench, target: Target) -> None:
    rows = 4 if bench.rehearse else ANSWER_ROWS
    asked, settings = prompts(bench, target, rows), decode(bench, rows, 1.0)

    def run() -> int:
        return sum(map(len, generate(target, asked, settings, seeds=range(rows))))

    bench.findings.figure(f"answers, {rows} rows: peak GB", bench.peak_gb(run))
    tokens = run()
    taken = bench.seconds(run, rounds=1)
    bench.findings.check(
        f"answers, {rows} rows: all are made", tokens == rows * settings[1], tokens
    )
    bench.findings.figure(f"answers, {rows} rows: tokens/s", tokens / taken)
