"""The report of one result or of several, side by side.

Its numbers are computed from the rows, so that every committed row counts.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import find_artifact, require_info
from deepspec.artifacts.results import EvaluationSummary, Interval, read_summary
from deepspec.errors import ArtifactMismatch, ConfigError
from deepspec.evaluate.results import compute_summary, read_rows
from deepspec.report.acceptance import temperature_sections
from deepspec.report.confidence import calibration_sections, scheduler_sections
from deepspec.report.lines import Result
from deepspec.report.origin import origin_sections, settings_of
from deepspec.report.page import ENDINGS, Fact, Format, Page, render_page
from deepspec.report.served import served_sections

SUBTITLE = (
    "Draft models for speculative decoding, measured against plain decoding of the same target."
)


def open_results(
    sources: Sequence[str], overrides: Sequence[str] = (), *, store: str | None = None
) -> list[Artifact]:
    """The results of runs, or those in folders or at URLs.

    Raises:
        ArtifactMismatch: one is an artifact of another stage, or nothing was evaluated yet.
    """
    artifacts = [find_artifact(source, overrides, store=store) for source in sources]
    for artifact in artifacts:
        stage = artifact.key.stage
        if stage != "evaluate":
            require_info(artifact)
            what = f"this is an artifact of the stage {stage!r}, not a result"
            fix = "give a run, or a folder under evaluate/ of its store"
        elif not artifact.record_shards():
            what, fix = "nothing was evaluated yet", "run `python -m deepspec evaluate` first"
        else:
            continue
        raise ArtifactMismatch(what, where=artifact.url, fix=fix)
    return artifacts


def labels_of(artifacts: Sequence[Artifact]) -> list[str]:
    """The name of each result's run, with its fingerprint if several runs have the same name."""
    names = [str(settings_of(one).get("name", one.key.name)) for one in artifacts]
    times = Counter(names)
    return [
        f"{name} {artifact.key.fingerprint[:6]}" if times[name] > 1 else name
        for name, artifact in zip(names, artifacts, strict=True)
    ]


def report_text(artifacts: Sequence[Artifact], form: Format) -> str:
    """The whole report as text."""
    return render_page(_page(artifacts), form)


def put_report(artifacts: Sequence[Artifact], forms: Sequence[Format] = ("html",)) -> list[str]:
    """Write the report into the first result's folder, outside its seal; returns the URLs."""
    first, *others = artifacts
    page = _page(artifacts)
    stem = "-".join(["report", *(other.key.fingerprint for other in others)])
    written = []
    for form in forms:
        name = f"{stem}.{ENDINGS[form]}"
        first.write(name, render_page(page, form).encode())
        written.append(f"{first.url}/{name}")
    return written


def save_report(artifacts: Sequence[Artifact], form: Format, output: str) -> str:
    """Write the report to a local file; returns its path.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        Path(output).write_text(report_text(artifacts, form), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write: {error.strerror}", where=output, fix="give another path with --output"
        ) from None
    return output


def _page(artifacts: Sequence[Artifact]) -> Page:
    results = [*map(_result, artifacts, labels_of(artifacts))]
    subtitle = SUBTITLE
    if unfinished := [one.label for one in results if one.artifact.manifest() is None]:
        subtitle += f" Not finished: {', '.join(unfinished)}; what is evaluated so far is shown."
    for result in results:
        # Counted once for each time that one would have been decoded.
        if left_out := sum(record.rejected for record in result.artifact.records().values()):
            what = f"{left_out:,} prompts of {result.label} were not decoded"
            subtitle += f" {what}; rejects/ in its folder has the reasons."
    sections = [
        *served_sections(results),
        *temperature_sections(results),
        *calibration_sections(results),
        *scheduler_sections(results),
        *origin_sections(results),
    ]
    names = ", ".join(result.label for result in results)
    facts = [(result.label, _facts(result.summary)) for result in results]
    return Page(f"Results of {names}", subtitle, facts, sections)


def _result(artifact: Artifact, label: str) -> Result:
    found = compute_summary(artifact, read_rows(artifact))
    if stored := read_summary(artifact):
        parts = {"calibration": stored.calibration, "scheduler": stored.scheduler}
        found = found.model_copy(update=parts)
    return Result(label, found, artifact)


def _facts(found: EvaluationSummary) -> list[Fact]:
    macro = found.macro
    speed = found.batch_sizes[0]
    per_s = speed.tokens_per_s
    at = f"temperature {found.temperature:g}"
    length = _interval(macro.intervals.acceptance_length)
    speedup = _interval(speed.interval)
    lossless = found.losslessness
    if found.temperature > 0:
        exact = Fact("Lossless", "in distribution", lossless.words)
    else:
        identical = f"{lossless.identical}/{lossless.prompts}"
        exact = Fact("Identical answers", identical, lossless.words)
    return [
        Fact("Acceptance length", f"{macro.acceptance_length:.2f}", f"{length}macro, {at}"),
        Fact("Speed-up", f"{speed.speedup:.2f} ×", f"{speedup}batch {speed.batch_size}, {at}"),
        Fact(
            "Tokens per second", f"{per_s.speculative:,.0f}", f"plain decoding {per_s.plain:,.0f}"
        ),
        exact,
    ]


def _interval(ends: Interval | None) -> str:
    return f"95 % {ends[0]:.2f}–{ends[1]:.2f}, " if ends else ""
