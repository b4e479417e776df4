"""Calibrated confidence: a temperature for each slot, fitted by sequential temperature scaling.

The confidence of slot k is the chance that its token is accepted given that all before it are;
their product up to k is the chance that the first k are all accepted. N rounds, g block size.
"""

import logging

import numpy as np

from deepspec.artifacts.records import Stored
from deepspec.evaluate.counts import Rows
from deepspec.evaluate.reliability import BINS, expected_calibration_error
from deepspec.evaluate.rounds import Rounds, headline, read_rounds, split_by_prompt, tempered

log = logging.getLogger(__name__)

# Rounds that reached a slot; the ECE of fewer is mostly noise, and its minimum lies anywhere.
MIN_TESTED = 200
GRID_STEPS, GRID_LIMIT = 161, 5.0  # temperatures tried: 1/5 to 5 in equal ratios


class Calibration(Stored):
    """`calibration.json`: a temperature for each slot [g], and what they were fitted on."""

    temperatures: list[float]
    rounds: int
    prompts: int
    benchmarks: list[str]
    sampling_temperature: float
    grid: dict[str, float]
    """The temperatures that were tried."""
    bins: int = BINS


def fit_temperatures(rounds: Rounds) -> list[float]:
    """One temperature per slot: each minimises the ECE of the product up to it, the earlier ones
    fixed.

    A slot that fewer than `MIN_TESTED` rounds reached keeps temperature 1.
    """
    grid = np.exp(np.linspace(-np.log(GRID_LIMIT), np.log(GRID_LIMIT), GRID_STEPS)).round(6)
    # Of equally good ones the nearest to 1 is taken.
    grid = grid[np.argsort(np.abs(np.log(grid)), kind="stable")]
    found = np.ones(rounds.confidence.shape[1])
    survival = np.ones(len(rounds.accepted))
    for slot, confidence in enumerate(rounds.confidence.T):
        if np.count_nonzero(rounds.accepted >= slot) < MIN_TESTED:
            break  # Nor did more rounds reach the slots behind it.
        errors = [
            expected_calibration_error(
                survival * tempered(confidence, 1.0 / temperature), rounds.accepted > slot
            )
            for temperature in grid
        ]
        found[slot] = grid[np.argmin(errors)]
        survival *= tempered(confidence, 1.0 / found[slot])
    temperatures: list[float] = found.tolist()
    return temperatures


def fit_calibration(rows: Rows, block_size: int) -> Calibration | None:
    """Temperatures fitted on half of the prompts of a result's rows.

    None, and a line in the log, where there is too little to fit on.
    """
    chosen = headline(rows)
    fitted, _ = split_by_prompt(read_rounds(chosen, block_size))
    num_rounds = len(fitted.accepted)
    if num_rounds < MIN_TESTED:
        has_confidence = any(row["confidence"] for row in chosen)
        why = "too few whole rounds to fit on" if has_confidence else "the draft has no confidence"
        log.info("no calibration: %s (rounds=%d of %d needed)", why, num_rounds, MIN_TESTED)
        return None
    return Calibration(
        temperatures=fit_temperatures(fitted),
        rounds=num_rounds,
        prompts=fitted.num_prompts,
        benchmarks=list(dict.fromkeys(row["benchmark"] for row in chosen)),
        sampling_temperature=chosen[0]["temperature"],
        grid={"low": 1 / GRID_LIMIT, "high": GRID_LIMIT, "steps": GRID_STEPS},
    )
