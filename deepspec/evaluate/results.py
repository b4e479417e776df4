"""A result in its artifact: what its rows are, they read back, and the summary of them."""

from typing import Any

import pyarrow as pa

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.results import EvaluationSummary
from deepspec.errors import DataError
from deepspec.evaluate.counts import Rows
from deepspec.evaluate.summary import summarise

COUNTS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    {
        "benchmark": pa.string(),
        "domain": pa.string(),
        "temperature": pa.float64(),
        "batch_size": pa.int32(),
        "group": pa.int32(),  # prompts decoded together share a number, and their seconds evenly
        "prompt": pa.int32(),
        "turn": pa.int32(),
        "prompt_digest": pa.string(),
        "num_prompt_tokens": pa.int32(),
        "num_tokens": pa.int32(),
        "plain_tokens": pa.int32(),
        "identical": pa.bool_(),
        "regret": pa.float32(),  # `logit_gap` of a greedy answer unlike the plain one
        "proposed": COUNTS,
        "accepted": COUNTS,
        "committed": COUNTS,
        "token_ids": COUNTS,
        "confidence": pa.list_(pa.list_(pa.float32())),  # of every drafted token, round by round
        "seconds": pa.float64(),
        "draft_seconds": pa.float64(),
        "verify_seconds": pa.float64(),
        "plain_seconds": pa.float64(),
    }
)
DOMAINS = ("math", "code", "chat")


def read_rows(artifact: Artifact) -> list[dict[str, Any]]:
    """All committed rows, with the columns that an older version did not write filled in."""
    return [_whole(row) for record in artifact.records().values() for row in artifact.rows(record)]


def _whole(row: dict[str, Any]) -> dict[str, Any]:
    domain = row["benchmark"] if row["benchmark"] in DOMAINS else "other"
    absent = {
        "batch_size": 1,
        "group": row["prompt"],
        "domain": domain,
        "turn": 0,
        "regret": None,
        "confidence": None,
    }
    return {**absent, **row}


def compute_summary(artifact: Artifact, rows: Rows) -> EvaluationSummary:
    """The summary of the artifact's rows, without calibration and scheduler.

    Raises:
        DataError: no prompt was decoded.
    """
    info = artifact.info()
    if not rows:
        why = "its folder rejects/ has the reason for each prompt that was left out"
        fix = f"{why}; choose other benchmarks, or lower evaluate.max_new_tokens"
        raise DataError("not one prompt was decoded", where=artifact.url, fix=fix)
    run = info.run if info else {}
    settings = run.get("evaluate", {})
    dtype = settings.get("dtype")
    if dtype is None and settings.get("engine") != "openai":  # those servers chose their own
        dtype = run.get("target", {}).get("dtype")
    return summarise(rows, dtype=dtype)
