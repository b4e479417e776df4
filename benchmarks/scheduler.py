"""The prefix scheduler against every fixed verify length, on recorded rounds served again to 1 to
1,024 requests at once.

`python -m benchmarks.scheduler [ROWS.json | RUN [KEY=VALUE ...]]`: rows of a result as JSON, or a
run whose evaluation told its confidences. Without an argument: 1,271 rounds of the demo's DSpark
draft (480 prompts, 200 steps, temperature 1, 60 held-out prompts), recorded on 2026-11-25.
Temperatures are fitted on half of the prompts, the other half is served.

Two curves: the shape of a GPU's (a step takes the same time up to 256 tokens, where reading the
weights is the limit, and grows with them beyond), and this machine's with random weights at the
demo's size, as `profile` gives it: smoothed. Goals: at many requests 0.98 of the best fixed length,
which only hindsight knows; at few 0.98 of verifying whole blocks.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks._measure import result
from deepspec.artifacts.results import SimulatedServing
from deepspec.artifacts.run import Run
from deepspec.config.recipes import load_run
from deepspec.evaluate.calibration import fit_calibration
from deepspec.evaluate.confidence import simulate_policies
from deepspec.evaluate.results import read_rows
from deepspec.evaluate.rounds import headline, read_rounds, split_by_prompt
from deepspec.evaluate.scheduler import schedule
from deepspec.evaluate.speed_curve import SpeedCurve, profile
from deepspec.target.model import Target

RECORDED = Path(__file__).with_name("scheduler_rounds.json")
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FEW, MANY = (1, 2, 4), (128, 256, 512, 1024)
KNEE, STEPS_PER_S = 256, 50.0
GOAL = 0.98


def recorded(source: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    if source.endswith(".json"):
        rows = json.loads(Path(source).read_text(encoding="utf-8"))
        return [{"batch_size": 1, **row} for row in rows]
    return read_rows(Run(load_run(source, overrides)).artifact("evaluate"))


def gpu_like() -> SpeedCurve:
    # behind its last point a curve grows with the tokens
    return SpeedCurve([1, KNEE], [STEPS_PER_S, STEPS_PER_S])


def of_this_machine(block_size: int) -> SpeedCurve:
    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=96,
        intermediate_size=240,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
    )
    return profile(Target(Qwen3ForCausalLM(config), layer_ids=(1, 3, 5)), block_size=block_size)


def ratios(found: Mapping[str, Sequence[SimulatedServing]]) -> dict[str, float]:
    """The least of all few, and of all many, numbers of requests."""
    speed = {
        name: {point.requests: point.throughput for point in points}
        for name, points in found.items()
    }
    fixed = [points for name, points in speed.items() if name.startswith("fixed@")]
    ours = speed["scheduled"]
    return {
        "few requests: scheduled/full": min(ours[number] / speed["full"][number] for number in FEW),
        "many requests: scheduled/best fixed": min(
            ours[number] / max(points[number] for points in fixed) for number in MANY
        ),
        "any number: scheduled/best fixed": min(
            ours[number] / max(points[number] for points in fixed) for number in REQUESTS
        ),
    }


def show(name: str, found: Mapping[str, Sequence[SimulatedServing]]) -> None:
    print(f"\n{name}: tokens/s of all, of one user, draft tokens verified a round")
    print(f"{'requests':14}" + "".join(f"{number:>20}" for number in REQUESTS))
    for policy, points in found.items():
        cells = (
            f"{point.throughput:.0f} {point.per_user:.1f} {point.verified_per_round:.1f}"
            for point in points
        )
        print(f"{policy:14}" + "".join(f"{cell:>20}" for cell in cells))


def milliseconds_of_a_call(requests: int = 256, block_size: int = 16, calls: int = 50) -> float:
    confidence = np.random.default_rng(0).uniform(0.3, 1.0, (requests, block_size))
    schedule(confidence, gpu_like())
    started = time.perf_counter()
    for _ in range(calls):
        schedule(confidence, gpu_like())
    return (time.perf_counter() - started) / calls * 1000


def main(source: str = str(RECORDED), *overrides: str) -> dict[str, object]:
    rows = recorded(source, overrides)
    block_size = max(max(row["proposed"]) for row in rows if row["proposed"])
    found = fit_calibration(rows, block_size)
    assert found is not None, "too few rounds with confidences"
    _, served = split_by_prompt(read_rounds(headline(rows), block_size))
    rounds = served.calibrated(found.temperatures)
    measured: dict[str, float] = {}
    for name, curve in (("GPU-like", gpu_like()), ("this machine", of_this_machine(block_size))):
        policies = simulate_policies(rounds, curve, requests=REQUESTS).policies
        show(name, policies)
        measured |= {f"{name}, {key}": value for key, value in ratios(policies).items()}
    goals = {key: GOAL for key in measured if "any number" not in key}
    return result(
        "scheduler",
        measured,
        goals,
        rounds=len(rounds.accepted),
        schedule_256x16_ms=round(milliseconds_of_a_call(), 3),
    )


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
