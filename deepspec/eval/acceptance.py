"""Metrics from raw counts, as defined in the project's algorithms page; nothing here knows how a token was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def acceptance_length(rows: Sequence[Mapping[str, Any]]) -> float:
    """Committed tokens per round, the target's bonus token included, over all rounds of all prompts (the paper's tau)."""
    rounds = sum(len(row["committed"]) for row in rows)
    return sum(sum(row["committed"]) for row in rows) / rounds if rounds else 0.0


def prefix_acceptance(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """At k: rounds whose first k draft tokens were all accepted / rounds that proposed at least k."""
    return [accepted / proposed if proposed else 0.0 for accepted, proposed in _per_position(rows)]


def conditional_acceptance(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """At k: of the rounds that accepted the first k - 1 and proposed a k-th, those that accepted it (the paper's Figure 2)."""
    curve = []
    for k in range(1, _longest(rows) + 1):
        tried = [accepted for proposed, accepted in _rounds(rows) if proposed >= k and accepted >= k - 1]
        curve.append(sum(accepted >= k for accepted in tried) / len(tried) if tried else 0.0)
    return curve


def verify_rate(rows: Sequence[Mapping[str, Any]]) -> float:
    """Committed tokens / (proposed tokens + rounds): the share of verified positions that were of use."""
    verified = sum(sum(row["proposed"]) + len(row["proposed"]) for row in rows)
    return sum(sum(row["committed"]) for row in rows) / verified if verified else 0.0


def tokens_per_s(rows: Sequence[Mapping[str, Any]], tokens: str, seconds: str) -> float:
    total = sum(row[seconds] for row in rows)
    return sum(row[tokens] for row in rows) / total if total else 0.0


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All metrics of a set of prompts decoded at one temperature, both ways."""
    plain, speculative = tokens_per_s(rows, "plain_tokens", "plain_seconds"), tokens_per_s(rows, "num_tokens", "seconds")
    return {
        "prompts": len(rows),
        "rounds": sum(len(row["proposed"]) for row in rows),
        "tokens": sum(row["num_tokens"] for row in rows),
        "acceptance_length": acceptance_length(rows),
        "prefix_acceptance": prefix_acceptance(rows),
        "conditional_acceptance": conditional_acceptance(rows),
        "verify_rate": verify_rate(rows),
        "tokens_per_s": {"plain": plain, "speculative": speculative},
        "speedup": speculative / plain if plain else 0.0,
        "seconds": {name: sum(row[name] for row in rows) for name in ("plain_seconds", "seconds", "draft_seconds", "verify_seconds")},
        "lossless": [sum(bool(row["identical"]) for row in rows), len(rows)],
    }


def _rounds(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    return [pair for row in rows for pair in zip(row["proposed"], row["accepted"], strict=True)]


def _longest(rows: Sequence[Mapping[str, Any]]) -> int:
    return max((proposed for proposed, _ in _rounds(rows)), default=0)


def _per_position(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    rounds = _rounds(rows)
    return [
        (sum(accepted >= k for _, accepted in rounds), sum(proposed >= k for proposed, _ in rounds)) for k in range(1, _longest(rows) + 1)
    ]
