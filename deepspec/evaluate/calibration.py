"""Calibrated confidence: how far the draft's own confidence can be believed, and temperatures that
mend it.

The confidence of slot k is the chance that its token is accepted given that all before it are;
their product up to k is the chance that the first k are all accepted. N rounds, g block size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from deepspec.evaluate.rounds import (
    Bools,
    Floats,
    Ints,
    Rounds,
    headline,
    read_rounds,
    split_by_prompt,
)
from deepspec.export.export import read_temperatures
from deepspec.storage.store import pretty_json

log = logging.getLogger(__name__)

BINS = 10  # of equal width, over [0, 1]
# rounds that reached a slot; the ECE of fewer is mostly noise, and its minimum lies anywhere
MIN_TESTED = 200
GRID_STEPS, GRID_LIMIT = 161, 5.0  # temperatures tried: 1/5 to 5 in equal ratios
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(20))

Array = TypeVar("Array", Floats, Tensor)


class Calibration(NamedTuple):
    """A temperature for each slot, and what they were fitted on."""

    temperatures: tuple[float, ...]  # [g]
    rounds: int
    prompts: int
    benchmarks: tuple[str, ...]
    sampling_temperature: float

    def to_json(self) -> dict[str, Any]:
        grid = {"low": 1 / GRID_LIMIT, "high": GRID_LIMIT, "steps": GRID_STEPS}
        return {**self._asdict(), "grid": grid, "bins": BINS}


def calibrated(confidence: Array, temperatures: Sequence[float] | None) -> Array:
    """Confidences [..., g] with each slot's logit divided by its temperature; unchanged where
    there are no temperatures.
    """
    if temperatures is None:
        return confidence
    if isinstance(confidence, Tensor):
        return _tempered(
            confidence,
            1.0 / torch.tensor(temperatures, dtype=confidence.dtype, device=confidence.device),
        )
    return _tempered(confidence, 1.0 / np.asarray(temperatures))


def _tempered(confidence: Any, power: Any) -> Any:
    """sigmoid(power * logit(confidence)), written so that 0 and 1 stay what they are."""
    yes, no = confidence**power, (1.0 - confidence) ** power
    return yes / (yes + no)


def cut_below(confidence: Floats, threshold: float) -> Ints:
    """Slots [...] in front of the first confidence [..., g] that is below the threshold."""
    kept: Ints = np.cumprod(confidence >= threshold, axis=-1, dtype=np.int64).sum(-1)
    return kept


# Measures of probabilities [N] against labels [N]


def expected_calibration_error(probability: Floats, label: Bools) -> float:
    """Mean distance between stated probability and frequency, over `BINS` bins of equal width
    weighted by their counts.
    """
    excess = np.bincount(_bins(probability), weights=probability - label, minlength=BINS)
    return float(np.abs(excess).sum() / len(label))


def auroc(probability: Floats, label: Bools) -> float | None:
    """Chance that an accepted slot has a higher probability than a rejected one, ties half;
    None where all are alike.
    """
    positives = int(label.sum())
    negatives = len(label) - positives
    if not positives or not negatives:
        return None
    _, place, counts = np.unique(probability, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # ties share the mean of their ranks
    return float((ranks[label].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def brier(probability: Floats, label: Bools) -> float:
    return float(np.mean((probability - label) ** 2))


def reliability(probability: Floats, label: Bools) -> list[dict[str, float | int | None]]:
    """Per bin: its bounds, how many fall into it, their mean probability and the share accepted
    (None where it is empty).
    """
    places = _bins(probability)
    counts, stated, accepted = (
        np.bincount(places, weights=weights, minlength=BINS)
        for weights in (None, probability, label)
    )
    return [
        {
            "low": number / BINS,
            "high": (number + 1) / BINS,
            "count": int(count),
            "confidence": float(stated[number] / count) if count else None,
            "accepted": float(accepted[number] / count) if count else None,
        }
        for number, count in enumerate(counts)
    ]


def _bins(probability: Floats) -> Ints:
    return np.minimum((probability * BINS).astype(np.int64), BINS - 1)


def measures(probability: Floats, label: Bools) -> dict[str, Any]:
    if not len(label):
        return {
            "ece": None,
            "auroc": None,
            "brier": None,
            "count": 0,
            "bins": reliability(probability, label),
        }
    ece, score = expected_calibration_error(probability, label), brier(probability, label)
    return {
        "ece": ece,
        "auroc": auroc(probability, label),
        "brier": score,
        "count": len(label),
        "bins": reliability(probability, label),
    }


# Sequential temperature scaling


def fit_temperatures(rounds: Rounds) -> tuple[float, ...]:
    """One temperature per slot: each minimises the ECE of the product up to it, the earlier ones
    fixed.

    A slot that fewer than `MIN_TESTED` rounds reached keeps temperature 1.
    """
    grid = np.exp(np.linspace(-np.log(GRID_LIMIT), np.log(GRID_LIMIT), GRID_STEPS)).round(6)
    # of equally good ones the nearest to 1 is taken
    grid = grid[np.argsort(np.abs(np.log(grid)), kind="stable")]
    found: list[float] = []
    survival = np.ones(len(rounds.accepted))
    for slot, confidence in enumerate(rounds.confidence.T):
        label = rounds.accepted > slot
        if np.count_nonzero(rounds.accepted >= slot) < MIN_TESTED:
            found.append(1.0)
            continue
        errors = [
            expected_calibration_error(survival * _tempered(confidence, 1.0 / temperature), label)
            for temperature in grid
        ]
        found.append(float(grid[int(np.argmin(errors))]))
        survival = survival * _tempered(confidence, 1.0 / found[-1])
    return tuple(found)


def fit_calibration(rows: Sequence[Mapping[str, Any]], block_size: int) -> Calibration | None:
    """Temperatures fitted on half of the prompts of a result's rows; None where there is too
    little to fit, which is logged.
    """
    chosen = headline(rows)
    fitted, _ = split_by_prompt(read_rounds(chosen, block_size))
    if len(fitted.accepted) < MIN_TESTED:
        why = (
            "the draft told no confidence"
            if not any(row.get("confidence") for row in chosen)
            else "too few whole rounds to fit on"
        )
        log.info(
            "no calibration: %s (rounds=%d of %d needed)", why, len(fitted.accepted), MIN_TESTED
        )
        return None
    benchmarks = tuple(dict.fromkeys(str(row["benchmark"]) for row in chosen))
    sampling_temperature = float(chosen[0]["temperature"])
    return Calibration(
        fit_temperatures(fitted),
        len(fitted.accepted),
        fitted.num_prompts,
        benchmarks,
        sampling_temperature,
    )


def write_calibration(calibration: Calibration, path: Path) -> None:
    """calibration.json, as `read_calibration` and the export of a draft read it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(pretty_json(calibration.to_json()))
    partial.replace(path)


def read_calibration(path: Path, block_size: int) -> tuple[float, ...]:
    """The temperatures [g] of a calibration.json, in float32 as every engine has them.

    Raises:
        ArtifactMismatch: not JSON, or not a positive number for each slot.
    """
    return tuple(read_temperatures(path, block_size).tolist())


# What a result says of it


def calibration_summary(
    rows: Sequence[Mapping[str, Any]], block_size: int
) -> dict[str, Any] | None:
    """Confidences before and after calibration, on the prompts that it was not fitted on; None
    as in `fit_calibration`.
    """
    found = fit_calibration(rows, block_size)
    if found is None:
        return None
    _, reported = split_by_prompt(read_rounds(headline(rows), block_size))
    after = Rounds(
        calibrated(reported.confidence, found.temperatures), reported.accepted, reported.prompt
    )
    return {
        "positions": _before_and_after(per_position(reported), per_position(after)),
        "cumulative": _before_and_after(cumulative(reported), cumulative(after)),
        "temperatures": list(found.temperatures),
        "thresholds": threshold_sweep(after),
        "fitted_on": {"rounds": found.rounds, "prompts": found.prompts},
        "reported_on": {"rounds": len(reported.accepted), "prompts": reported.num_prompts},
    }


def per_position(rounds: Rounds) -> list[dict[str, Any]]:
    """Each slot's confidence against its acceptance, of the rounds that got there."""
    slots = enumerate(rounds.confidence.T)
    tested = [
        (confidence[rounds.accepted >= slot], rounds.accepted[rounds.accepted >= slot] > slot)
        for slot, confidence in slots
    ]
    return [measures(confidence, label) for confidence, label in tested]


def cumulative(rounds: Rounds) -> list[dict[str, Any]]:
    """The product up to each slot against acceptance of all slots up to it, of all rounds."""
    return [
        measures(survival, rounds.accepted > slot)
        for slot, survival in enumerate(np.cumprod(rounds.confidence, axis=1).T)
    ]


def _before_and_after(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    pairs = enumerate(zip(before, after, strict=True), start=1)
    return [
        {"position": position, "before": dict(raw), "after": dict(mended)}
        for position, (raw, mended) in pairs
    ]


def threshold_sweep(
    rounds: Rounds, thresholds: Sequence[float] = THRESHOLDS
) -> list[dict[str, float]]:
    """What cutting each block at the first confidence below a threshold would have given (the
    paper's Figure 5).

    A replay: a round that would have been cut still ends where it ended, so the next one begins
    further on than it would have. Figures are exact for each recorded round and assume that rounds
    begun elsewhere are like those.
    """
    found = []
    for threshold in thresholds:
        proposed = cut_below(rounds.confidence, threshold)
        committed = float((np.minimum(rounds.accepted, proposed) + 1).sum())
        count, total = len(proposed), float(proposed.sum())
        found.append(
            {
                "threshold": threshold,
                "acceptance_length": committed / count,
                "verify_rate": committed / (total + count),
                "proposed_per_round": total / count,
            }
        )
    return found
