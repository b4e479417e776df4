"""Results as an evaluation writes them, made up: rows of any size in no time, and an artifact
that holds them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import Counts
from deepspec.artifacts.results import CalibrationSummary, SchedulerSummary
from deepspec.artifacts.run import Run
from deepspec.artifacts.tables import write_table
from deepspec.config.recipes import section_of
from deepspec.config.run import RunConfig
from deepspec.evaluate.results import compute_summary, read_rows
from deepspec.storage.store import pretty_json

BENCHMARKS = {"gsm8k": ("math", 0.9), "humaneval": ("code", 0.75), "alpaca": ("chat", 0.55)}


def made_rows(
    *,
    benchmarks: dict[str, tuple[str, float]] = BENCHMARKS,
    prompts: int = 24,
    batch_sizes: Sequence[int] = (1,),
    temperatures: Sequence[float] = (0.0,),
    block: int = 7,
    better: float = 0.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row per prompt; each prompt has its own rate of acceptance, around its benchmark's
    (plus `better`).
    """
    rows = []
    for temperature in temperatures:
        for batch_size in batch_sizes:
            for name, (domain, rate) in benchmarks.items():
                for prompt in range(prompts):
                    rng = np.random.default_rng([seed, prompt, len(name)])
                    own = np.clip(
                        rate + better - 0.1 * temperature + rng.normal(0, 0.08), 0.05, 0.97
                    )
                    taken = rng.random((int(rng.integers(8, 20)), block)) < own
                    accepted = np.where(taken.all(1), block, taken.argmin(1))
                    tokens, rounds = int(accepted.sum() + len(accepted)), len(accepted)
                    per_round = 0.02 * (1 + 0.12 * batch_size) / batch_size
                    seconds = rounds * per_round * rng.uniform(0.95, 1.05)
                    rows.append(
                        {
                            "benchmark": name,
                            "domain": domain,
                            "temperature": temperature,
                            "batch_size": batch_size,
                            "group": prompt // batch_size,
                            "prompt": prompt,
                            "turn": 0,
                            "prompt_digest": f"{name}-{prompt}",
                            "num_prompt_tokens": 60,
                            "num_tokens": tokens,
                            "plain_tokens": tokens,
                            "identical": temperature == 0,
                            "regret": None,
                            "proposed": [block] * rounds,
                            "accepted": accepted.tolist(),
                            "committed": (accepted + 1).tolist(),
                            "confidence": None,
                            "token_ids": [5] * tokens,
                            "seconds": seconds,
                            "draft_seconds": 0.3 * seconds,
                            "verify_seconds": 0.6 * seconds,
                            "plain_seconds": tokens * 0.012 / batch_size * rng.uniform(0.95, 1.05),
                        }
                    )
    return rows


def made_calibration(block: int = 7) -> CalibrationSummary:
    """As an evaluation writes it into summary.json."""

    def position(k: int, off: float) -> dict[str, Any]:
        middles = np.linspace(0.05, 0.95, 10)
        shares = [float(np.clip(m - off * m * (1 - m), 0, 1)) for m in middles.tolist()]
        bins = [
            {
                "low": m - 0.05,
                "high": m + 0.05,
                "count": int(40 + 200 * m),
                "confidence": m,
                "accepted": share,
            }
            for m, share in zip(middles.tolist(), shares, strict=True)
        ]
        return {
            "ece": 0.12 * off,
            "auroc": 0.8 - 0.01 * k,
            "brier": 0.15 + 0.05 * off,
            "count": 900 // k,
            "bins": bins,
        }

    both = [
        {"position": k, "before": position(k, 1.2), "after": position(k, 0.15)}
        for k in range(1, block + 1)
    ]
    sweep = [
        {
            "threshold": t,
            "acceptance_length": 4.6 - 3.2 * t**2,
            "verify_rate": 0.55 + 0.35 * t,
            "proposed_per_round": 7 - 6 * t,
        }
        for t in np.arange(0, 1, 0.05).tolist()
    ]
    temperatures, split = [1.1 + 0.1 * k for k in range(block)], {"prompts": 36, "rounds": 450}
    found = {
        "positions": both,
        "cumulative": both,
        "temperatures": temperatures,
        "thresholds": sweep,
    }
    return CalibrationSummary.model_validate({**found, "fitted_on": split, "reported_on": split})


def made_scheduler() -> SchedulerSummary:
    """As an evaluation writes it into summary.json."""
    requests = [1, 4, 16, 64, 256]

    def policy(gain: float, knee: float) -> list[dict[str, Any]]:
        found = []
        for number in requests:
            throughput = gain * 400 * number / (1 + number / knee)
            found.append(
                {
                    "requests": number,
                    "throughput": throughput,
                    "per_user": throughput / number,
                    "verified_per_round": gain * 4,
                    "lengths": [0.125] * 8,
                }
            )
        return found

    fixed = {f"fixed@{k}": policy(0.5 + 0.1 * min(k, 4), 90 - 9 * k) for k in range(8)}
    found = {
        "requests": requests,
        "policies": {
            "full": policy(1.0, 20),
            **fixed,
            "threshold@0.5": policy(1.0, 50),
            "scheduled": policy(1.05, 80),
        },
        "curve": {"tokens": [1, 64], "steps_per_second": [80.0, 60.0]},
    }
    return SchedulerSummary.model_validate(found)


def put_result(
    config: RunConfig,
    rows: Sequence[dict[str, Any]],
    *,
    more: dict[str, Any] | None = None,
    without: Sequence[str] = (),
) -> Artifact:
    """A sealed result of the run that holds these rows, its summary with `more` sections;
    `without` leaves columns out.
    """
    artifact = Run(config).artifact("evaluate")
    artifact.create(section_of(config))
    kept = [{name: value for name, value in row.items() if name not in without} for row in rows]
    with artifact.store.staged() as local:
        write_table(pa.Table.from_pylist(kept), local)
        artifact.commit(
            0,
            local,
            Counts(rows=len(rows), tokens=sum(row["num_tokens"] for row in rows)),
            upstream=None,
        )
    summary = compute_summary(artifact, read_rows(artifact)).model_copy(update=more)
    artifact.store.write(artifact.path("summary.json"), pretty_json(summary.to_json()))
    artifact.seal(shards=[0], files=["summary.json"], inputs={})
    return artifact


def folder_of(artifact: Artifact) -> str:
    return str(Path(artifact.url.removeprefix("file://")))
