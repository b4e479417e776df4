"""A result read back from its artifact: its rows, and the summary of them."""

from __future__ import annotations

import json
from typing import Any

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.tables import read_table
from deepspec.errors import DataError
from deepspec.evaluate.summary import summarise

DOMAINS = ("math", "code", "chat")


def read_rows(artifact: Artifact) -> list[dict[str, Any]]:
    """All committed rows; a column that an older version did not write has what it would have
    held.
    """
    return [
        _whole(row)
        for record in artifact.records().values()
        for row in read_table(artifact.fetch_shard(record)).to_pylist()
    ]


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


def summary(artifact: Artifact) -> dict[str, Any]:
    """All metrics per benchmark and temperature, and the macro means at the first temperature as
    the headline.

    Raises:
        DataError: no prompt was decoded.
    """
    rows, info = read_rows(artifact), artifact.info()
    if not rows:
        fix = "its folder rejects/ says why each prompt was left out; choose other benchmarks, or lower evaluate.max_new_tokens"
        raise DataError("not one prompt was decoded", where=artifact.url, fix=fix)
    run = info.run if info else {}
    dtype = run.get("evaluate", {}).get("dtype") or run.get("target", {}).get("dtype")
    return summarise(rows, dtype=dtype)


def stored_summary(artifact: Artifact) -> dict[str, Any]:
    """What `summary.json` says; empty where the evaluation has not come to its end."""
    try:
        return dict(json.loads(artifact.store.read(artifact.path("summary.json"))))
    except FileNotFoundError:
        return {}
