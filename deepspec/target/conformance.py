"""The `conformance` verb: this code agrees with the reference's numbers, and a target is what a draft takes it for."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from deepspec.errors import ConfigError
from deepspec.evaluate.cases import Check, table_of


def run_conformance(*, vectors: str | None, model: str | None) -> tuple[Table, bool]:
    """The table of all checks, and whether every one of them passed.

    Raises:
        ConfigError: neither or both were asked for.
    """
    checks: dict[str, list[Check]]
    if vectors is not None and model is None:
        from deepspec.evaluate.vectors import run_vectors

        checks = run_vectors(Path(vectors))
    elif model is not None and vectors is None:
        from deepspec.target.target_checks import run_target_checks

        checks = run_target_checks(Path(model))
    else:
        fix = "give --vectors DIR or --model PATH"
        raise ConfigError("conformance checks either reference vectors or a model", where="command line", fix=fix)
    return table_of(checks, subject="case" if vectors else "part"), all(check.passed for found in checks.values() for check in found)
