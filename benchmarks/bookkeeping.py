"""What a round of batched speculative decoding costs beside its models: 2,000 rounds of 32 rows
with models that are free.

The target and the draft are scripted: they hand out the same tensors in every round, and accepting
3 of 7 tokens moves every row on. Goal: at most 0.3 ms for each row and round, greedy and drawn,
with and without a policy.
"""

import json
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks._measure import result
from deepspec.config.data import SamplingConfig
from deepspec.evaluate.scheduler import Policy
from deepspec.evaluate.speculate import speculate
from deepspec.model.cache_shelf import CacheShelf
from deepspec.model.drafter import Proposal
from deepspec.target.generate import Decode
from deepspec.target.model import TargetOutput

ROWS, BLOCK, ACCEPTED, ROUNDS, VOCABULARY = 32, 7, 3, 2_000, 64
GOAL_MS = 0.3


class FreeCache:
    def __init__(self, rows: int) -> None:
        self.lengths = [0] * rows

    def reset(self) -> None: ...
    def keep(self, rows: list[int]) -> None: ...
    def put(self, rows: list[int], fresh: "FreeCache") -> None: ...

    def run(self, name: str, step: Any, inputs: Any, **_: Any) -> Any:
        return step(*inputs)


class FreeTarget:
    """Its likeliest token is always 1, and the state says nothing."""

    device = torch.device("cpu")
    shelf = CacheShelf(device, graphs=False)

    def new_cache(self, rows: int, capacity: int) -> FreeCache:
        return FreeCache(rows)

    def forward(self, input_ids: torch.Tensor, cache: Any) -> TargetOutput:
        empty = torch.zeros(*input_ids.shape, 1)
        return TargetOutput(empty, empty)

    def logits(self, last_hidden: torch.Tensor) -> torch.Tensor:
        return LOGITS.expand(*last_hidden.shape[:-1], VOCABULARY)


LOGITS = torch.zeros(VOCABULARY).index_fill(0, torch.tensor([1]), 30.0)
TOKENS = torch.tensor([1] * ACCEPTED + [2] * (BLOCK - ACCEPTED)).expand(ROWS, -1)
CONFIDENCE = torch.linspace(0.9, 0.3, BLOCK).expand(ROWS, -1)


def free_draft(*, drawn: bool) -> Any:
    probs = torch.nn.functional.one_hot(TOKENS, VOCABULARY).float() if drawn else None
    return SimpleNamespace(
        block_size=BLOCK,
        new_cache=lambda rows, capacity: FreeCache(rows),
        extend=lambda *_: None,
        propose=lambda *_: Proposal(TOKENS, probs, CONFIDENCE),
    )


def milliseconds(temperature: float, policy: Policy | None) -> float:
    """For a row and round."""
    settings = Decode(
        SamplingConfig(temperature=temperature), 1 + ROUNDS * (ACCEPTED + 1), frozenset()
    )
    draft = free_draft(drawn=temperature > 0)
    started = time.perf_counter()
    traces, _ = speculate(
        FreeTarget(), draft, [[5, 6]] * ROWS, settings, seeds=range(ROWS), policy=policy
    )  # type: ignore[arg-type]
    spent = time.perf_counter() - started
    assert all(trace.accepted == [ACCEPTED] * ROUNDS for trace in traces)
    return 1e3 * spent / (ROWS * ROUNDS)


def whole(confidence: np.ndarray, running: np.ndarray) -> np.ndarray:
    """Asks for the whole block, so that what a policy costs is the asking."""
    return np.where(running, confidence.shape[1], 0)


def main() -> dict[str, object]:
    cases = {"greedy": (0.0, None), "drawn": (1.0, None), "greedy, with a policy": (0.0, whole)}
    spent = {name: milliseconds(*case) for name, case in cases.items()}
    ratios = {
        f"{name}: 0.3 ms / time for a row and round": GOAL_MS / value
        for name, value in spent.items()
    }
    return result(
        "bookkeeping",
        ratios,
        dict.fromkeys(ratios, 1.0),
        milliseconds={name: round(value, 4) for name, value in spent.items()},
    )


if __name__ == "__main__":
    print(json.dumps(main()))
