"""Decoding of the demo target, all ways in one run, outputs compared: plain, speculative, and
transformers' assisted generation.

Needs the demo's store (`make demo` first; other stores by `--set`-like arguments: `store=...`).
Prompt by prompt the sides take turns at batch 1, then plain and speculative at batch 8, rows that
finish taking the prompts that wait. transformers assists with the same number of drafted tokens a
round, by prompt lookup and by exiting its own target early (the only assistants that this target
has there); the better of the two counts.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks._measure import result
from deepspec.artifacts.run import Run
from deepspec.config.data import SamplingConfig
from deepspec.config.recipes import load_run
from deepspec.evaluate.prompts import load_benchmarks, render_turns
from deepspec.evaluate.speculate import speculate
from deepspec.evaluate.stage import load_models
from deepspec.evaluate.units import Models
from deepspec.target.generate import Decode, generate

ROUNDS, BATCH, EARLY_EXIT = 3, 8, 4
PLAIN, SPECULATIVE, ASSISTED = "plain", "speculative", "assisted"
GOALS = {
    "speculative/plain at batch 1": 1.5,
    f"speculative/plain at batch {BATCH}": 1.0,
    f"speculative, batch {BATCH}/batch 1": 3.0,
    "speculative/assisted generation of transformers at batch 1": 1.5,
}
Side = Callable[[Sequence[list[int]]], list[list[int]]]


def sides(models: Models, settings: Decode) -> dict[str, Side]:
    """At batch 1."""

    def assisted(**how: int) -> Side:
        model, stop_ids = models.target.model, sorted(models.stop_ids)

        def run(prompts: Sequence[list[int]]) -> list[list[int]]:
            ids, limit = torch.tensor(prompts), settings.max_new_tokens
            out = model.generate(
                ids,
                max_new_tokens=limit,
                do_sample=False,
                eos_token_id=stop_ids,
                pad_token_id=0,
                **how,
            )
            return [out[0, ids.shape[1] :].tolist()]

        return run

    return {
        PLAIN: lambda prompts: generate(models.target, prompts, settings, seeds=[0] * len(prompts)),
        SPECULATIVE: lambda prompts: [
            trace.token_ids
            for trace in speculate(
                models.target, models.draft, prompts, settings, seeds=[0] * len(prompts)
            )[0]
        ],
        "prompt lookup": assisted(prompt_lookup_num_tokens=models.draft.block_size),
        "early exit": assisted(
            assistant_early_exit=EARLY_EXIT, num_assistant_tokens=models.draft.block_size
        ),
    }


def main(run: str = "demo", *overrides: str) -> dict[str, object]:
    store = next(
        (word.removeprefix("store=") for word in overrides if word.startswith("store=")), None
    )
    config = load_run(
        run, [word for word in overrides if not word.startswith("store=")], store=store
    )
    torch.set_num_threads(config.resources.devices.evaluate_threads or torch.get_num_threads())
    models = load_models(Run(config))
    settings = Decode(
        SamplingConfig(temperature=0), config.evaluate.max_new_tokens, models.stop_ids, batch_size=1
    )
    prompts = [
        render_turns(models.chat, text).input_ids
        for benchmark in load_benchmarks(Run(config))
        for text in benchmark.prompts
    ]
    alone = sides(models, settings)
    together = sides(models, settings._replace(batch_size=BATCH))
    answers = alone[PLAIN](prompts)
    tokens, seconds = (
        sum(map(len, answers)),
        dict.fromkeys([*alone, f"{PLAIN} {BATCH}", f"{SPECULATIVE} {BATCH}"], 0.0),
    )

    def measure(name: str, side: Side, batch: Sequence[list[int]], wanted: list[list[int]]) -> None:
        started = time.perf_counter()
        found = side(batch)
        seconds[name] += time.perf_counter() - started
        assert found == wanted, f"{name} changed an answer"

    for side in alone.values():
        side(prompts[:1])  # what only the first call costs
    for number in range(ROUNDS):
        for place, prompt in enumerate(prompts):
            order = list(alone) if (number + place) % 2 == 0 else list(alone)[::-1]
            for name in order:
                measure(name, alone[name], [prompt], [answers[place]])
        for name in [PLAIN, SPECULATIVE][:: 1 if number % 2 == 0 else -1]:
            measure(f"{name} {BATCH}", together[name], prompts, answers)
    rate = {name: round(ROUNDS * tokens / spent, 1) for name, spent in seconds.items()}
    rate[ASSISTED] = max(rate["prompt lookup"], rate["early exit"])
    found = [
        rate[SPECULATIVE] / rate[PLAIN],
        rate[f"{SPECULATIVE} {BATCH}"] / rate[f"{PLAIN} {BATCH}"],
    ]
    found += [
        rate[f"{SPECULATIVE} {BATCH}"] / rate[SPECULATIVE],
        rate[SPECULATIVE] / rate[ASSISTED],
    ]
    return result("decoding", dict(zip(GOALS, found, strict=True)), GOALS, tokens_per_s=rate)


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    print(json.dumps(main(*sys.argv[1:])))
