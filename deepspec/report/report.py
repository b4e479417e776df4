"""The report of one result or of several side by side: numbers computed from the rows, so that
any committed row counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import describe, find_artifact
from deepspec.errors import ArtifactMismatch, ConfigError
from deepspec.evaluate.results import stored_summary, summary
from deepspec.report.acceptance import Result, temperature_sections
from deepspec.report.confidence import calibration_sections, origin_sections, scheduler_sections
from deepspec.report.page import Fact, Format, Page, render

ENDINGS = {"html": "html", "markdown": "md"}


def open_results(
    sources: Sequence[str], overrides: Sequence[str] = (), *, store: str | None = None
) -> list[Artifact]:
    """The results of runs, or those in folders or under URLs.

    Raises:
        ArtifactMismatch: it is an artifact of another stage, or nothing was evaluated yet.
    """
    artifacts = [find_artifact(source, overrides, store=store) for source in sources]
    for artifact in artifacts:
        if artifact.key.stage != "evaluate" and artifact.info() is None:
            raise ArtifactMismatch(
                "there is no artifact here",
                where=artifact.url,
                fix="give a run, or a folder under evaluate/ of its store",
            )
        if artifact.key.stage != "evaluate":
            what = f"this is an artifact of the stage {artifact.key.stage!r}, not a result"
            raise ArtifactMismatch(
                what, where=artifact.url, fix="give a run, or a folder under evaluate/ of its store"
            )
        if not artifact.record_shards():
            raise ArtifactMismatch(
                "nothing was evaluated yet",
                where=artifact.url,
                fix="run `python -m deepspec evaluate` first",
            )
    return artifacts


def labels_of(artifacts: Sequence[Artifact]) -> list[str]:
    """A name for each: that of its run, and its fingerprint where several runs have the same."""
    names = [
        str(info.run.get("name", artifact.key.name))
        if (info := artifact.info())
        else artifact.key.name
        for artifact in artifacts
    ]
    times = Counter(names)
    return [
        f"{name} {artifact.key.fingerprint[:6]}" if times[name] > 1 else name
        for name, artifact in zip(names, artifacts, strict=True)
    ]


def report(artifacts: Sequence[Artifact], form: Format) -> str:
    """The whole report as text."""
    return render(_page(artifacts), form)


def put_report(artifacts: Sequence[Artifact], forms: Sequence[Format] = ("html",)) -> list[str]:
    """Write the report beside the first result (it is no part of its seal); returns where."""
    first, *others = artifacts
    page, written = _page(artifacts), []
    for form in forms:
        name = f"report{''.join(f'-{other.key.fingerprint}' for other in others)}.{ENDINGS[form]}"
        first.store.write(first.path(name), render(page, form).encode())
        written.append(f"{first.url}/{name}")
    return written


def save_report(artifacts: Sequence[Artifact], form: Format, output: str) -> str:
    """Write the report to a local file; returns it.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        Path(output).write_text(report(artifacts, form), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write: {error.strerror}", where=output, fix="give another path with --output"
        ) from None
    return output


def _page(artifacts: Sequence[Artifact]) -> Page:
    results = [
        _result(artifact, label)
        for artifact, label in zip(artifacts, labels_of(artifacts), strict=True)
    ]
    names = ", ".join(result.label for result in results)
    unfinished = [result.label for result in results if not result.sealed]
    subtitle = (
        "Draft models for speculative decoding, measured against plain decoding of the same target."
    )
    if unfinished:
        subtitle += f" Not finished: {', '.join(unfinished)}; what is evaluated so far is shown."
    for result in results:
        if result.left_out:
            subtitle += f" {result.left_out:,} prompts of {result.label} were not decoded; rejects/ beside its rows says why."
    sections = [
        *temperature_sections(results),
        *calibration_sections(results),
        *scheduler_sections(results),
        *origin_sections(results),
    ]
    return Page(
        f"Results of {names}",
        subtitle,
        [(result.label, _facts(result)) for result in results],
        sections,
    )


def _result(artifact: Artifact, label: str) -> Result:
    info, found = artifact.info(), {**stored_summary(artifact), **summary(artifact)}
    left_out = sum(record.rejected for record in artifact.records().values())
    return Result(
        label,
        found,
        info.run if info else {},
        list(describe(artifact.url)),
        artifact.manifest() is not None,
        left_out,
    )


def _facts(result: Result) -> list[Fact]:
    found = result.summary
    speed, macro = found["batch_sizes"][0], found["macro"]
    at = f"temperature {found['temperature']:g}"
    return [
        Fact(
            "Acceptance length",
            f"{macro['acceptance_length']:.2f}",
            f"{_range(macro['intervals']['acceptance_length'])}macro, {at}",
        ),
        Fact(
            "Speed-up",
            f"{speed['speedup']:.2f} ×",
            f"{_range(speed['interval'])}batch {speed['batch_size']}, {at}",
        ),
        Fact(
            "Tokens per second",
            f"{speed['tokens_per_s']['speculative']:,.0f}",
            f"plain decoding {speed['tokens_per_s']['plain']:,.0f}",
        ),
        _lossless_fact(found["temperature"], found["losslessness"]),
    ]


def _lossless_fact(temperature: float, found: Mapping[str, Any]) -> Fact:
    if temperature > 0:
        return Fact("Lossless", "in distribution", found["words"])
    return Fact("Identical answers", f"{found['identical']}/{found['prompts']}", found["words"])


def _range(interval: Sequence[float] | None) -> str:
    return f"95 % {interval[0]:.2f}–{interval[1]:.2f}, " if interval else ""
