"""The loss over the vocabulary in chunks against the plain PyTorch formula, forward and backward,
on a CPU.

3,584 slots (512 anchors of 7) at 1,024 target positions, vocabulary 32,768, hidden size 256, Markov
rank 64: DSpark's three terms, and Eagle3's soft cross-entropy. Goals: an eighth of the memory at
most, and no more time, in float32 and bfloat16.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._measure import alternate, peak_bytes, result
from deepspec.model.chunked_loss import Coefficients, Vocabulary, score
from deepspec.model.host_copy import send_all
from deepspec.model.targets import TargetPlaces, Targets

ROUNDS = 3
CPU = torch.device("cpu")


class Sizes(NamedTuple):
    slots: int = 3584
    positions: int = 1024
    vocabulary: int = 32_768
    hidden: int = 256
    rank: int = 64


def made(sizes: Sizes, device: torch.device = CPU) -> dict[str, Tensor]:
    slots, positions, vocabulary, hidden, rank = sizes
    how: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    shapes = {
        "states": (slots, hidden),
        "features": (slots, rank),
        "w2": (vocabulary, rank),
        "hidden": (positions, hidden),
    }
    parts = {
        name: torch.randn(shape, **how).requires_grad_(name != "hidden")
        for name, shape in shapes.items()
    }
    return parts | {
        "lm_head": torch.randn(vocabulary, hidden, **how) * hidden**-0.5,
        # of the host, where plans are made
        "places": torch.randint(positions, (slots,), generator=torch.Generator().manual_seed(0)),
        "labels": torch.randint(vocabulary, (slots,), **how),
        "weights": torch.rand(slots, **how),
    }


def plain(parts: dict[str, Tensor], algorithm: str) -> Tensor:
    logits = F.linear(parts["states"], parts["lm_head"])
    if algorithm == "dspark":
        logits = logits + F.linear(parts["features"], parts["w2"])
    log_p = logits.log_softmax(-1)
    q = F.linear(parts["hidden"][parts["places"]], parts["lm_head"]).softmax(-1)
    if algorithm == "eagle3":
        return -(parts["weights"] * (q * log_p).sum(-1)).sum()
    cross_entropy = -log_p.gather(-1, parts["labels"][:, None])[:, 0]
    return (parts["weights"] * (0.1 * cross_entropy + 0.9 * (log_p.exp() - q).abs().sum(-1))).sum()


def chunked(parts: dict[str, Tensor], algorithm: str, *, compile: bool = False) -> Tensor:
    dspark, weights = algorithm == "dspark", parts["weights"]
    coefficients = (
        Coefficients(ce=0.1 * weights, tv=0.9 * weights)
        if dspark
        else Coefficients(soft_ce=weights)
    )
    features, labels = (parts["features"], parts["labels"]) if dspark else (None, None)
    places = send_all(TargetPlaces.of(parts["places"]), parts["hidden"].device)
    targets = Targets.gathered(parts["hidden"], places)
    vocabulary = Vocabulary(parts["lm_head"], parts["w2"], None, compile)
    return score(
        parts["states"], features, vocabulary, targets, labels=labels, coefficients=coefficients
    ).total


def step(
    loss: Callable[[dict[str, Tensor], str], Tensor],
    parts: dict[str, Tensor],
    algorithm: str,
    *,
    bf16: bool,
) -> tuple[float, int]:
    """Seconds of forward and backward, and the memory (bytes) that they needed beside the
    inputs.
    """
    for part in parts.values():
        part.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, began = peak_bytes(), time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        total = loss(parts, algorithm)
    total.backward()
    return time.perf_counter() - began, peak_bytes() - before


def seconds_of(
    loss: Callable[[dict[str, Tensor], str], Tensor],
    parts: dict[str, Tensor],
    algorithm: str,
    *,
    bf16: bool,
) -> float:
    return step(loss, parts, algorithm, bf16=bf16)[0]


def main() -> dict[str, object]:
    parts, ratios, goals = made(Sizes()), {}, {}
    seconds: dict[str, float] = {}
    for algorithm in ("dspark", "eagle3"):
        for bf16 in (False, True):
            sides = {"chunked": chunked, "plain": plain}
            memory = {
                name: step(side, parts, algorithm, bf16=bf16)[1] for name, side in sides.items()
            }
            timed = {
                name: partial(seconds_of, side, parts, algorithm, bf16=bf16)
                for name, side in sides.items()
            }
            taken = alternate(timed, rounds=ROUNDS)
            name = f"{algorithm} {'bf16' if bf16 else 'float32'}"
            ratios |= {f"{name}: memory, plain/ours": memory["plain"] / memory["chunked"]}
            ratios |= {f"{name}: time, plain/ours": taken["plain"] / taken["chunked"]}
            goals |= {f"{name}: memory, plain/ours": 8.0, f"{name}: time, plain/ours": 1.0}
            seconds |= {f"{name} {side}": round(value, 2) for side, value in taken.items()}
    return result("loss", ratios, goals, seconds=seconds)


if __name__ == "__main__":
    print(json.dumps(main()))
