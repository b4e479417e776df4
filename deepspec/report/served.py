"""A section of the report for each served result: beside the one in process of the same draft.

Acceptance as trained, in process and served; speed-up in process and served by concurrency. Rounds
that differ by more than rounding explains are a finding, with the likely causes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import input_artifact, require_info
from deepspec.artifacts.records import ArtifactInfo
from deepspec.artifacts.results import BatchSpeed, EvaluationSummary
from deepspec.evaluate.results import compute_summary, read_rows
from deepspec.evaluate.served_compare import ServedLine, served_lines
from deepspec.evaluate.server_check import ENGINE, ServedBy
from deepspec.figures.charts import Point, Series, line_chart, ranged
from deepspec.report.lines import Result
from deepspec.report.page import Finding, Gallery, ReportSection, Table

ALIKE = ("top_p", "top_k", "max_new_tokens", "verify")  # settings
PROMPT = itemgetter("benchmark", "temperature", "prompt_digest")
TRAINED = "held_out_acceptance_length"
Dtypes = tuple[str | None, str | None]  # number formats in process, served
TEXT = (
    "Acceptance length: tokens committed per round, as measured while it was trained (held-out "
    "samples of the training data), in process, and served. Served rounds are those that the "
    "engine counted."
)
NOTE = (
    "Difference: 95 % interval of served less in process, over prompts that are in both. Rounds "
    "agree where rounding explains the difference: none in float32 at temperature 0, else at most "
    "2 % of the acceptance length, or an interval that holds 0."
)
SPEED_NOTE = (
    "Speed-up over plain decoding, of as many prompts decoded together in process as requests "
    "are in flight at the server."
)
NO_PARTNER = (
    "There is no result in process of this draft with the same settings in its store: run the same "
    "evaluation with evaluate.engine=in_process, and this section sets it beside this one."
)
NEXT_TO_NOTHING = 0.2
"""Accepted tokens per round, as a share of those in process, below which no rounding but a wrong
layout or wrong layers are at work."""


class Partner(NamedTuple):
    """The result in process that a served one is set beside."""

    summary: EvaluationSummary
    rows: Sequence[dict[str, Any]]


def served_sections(results: Sequence[Result]) -> Iterator[ReportSection]:
    """A section for each result that was served."""
    for result in results:
        served_by = result.artifact.document(ENGINE, ServedBy)
        if served_by is None:
            continue
        of_run = f" of {result.label}" if len(results) > 1 else ""
        name = f"vLLM {served_by.version}" if served_by.version else "an engine without a version"
        text = (
            f"{TEXT} Served by {name}, {served_by.num_speculative_tokens} tokens proposed per "
            f"round, draft sampling {served_by.draft_sampling}."
        )
        rows = read_rows(result.artifact)
        partner = find_partner(result.artifact, rows)
        blocks: list[Finding | Table | Gallery] = []
        if partner is None:
            text = f"{text} {NO_PARTNER}"
        else:
            dtypes = (partner.summary.losslessness.dtype, result.summary.losslessness.dtype)
            lines = served_lines(partner.rows, rows, dtypes)
            if any(line.is_finding for line in lines):
                blocks.append(_finding(lines, partner, served_by, dtypes))
            blocks.append(_acceptance(lines, trained_length(result.artifact)))
        blocks += _speed(result.summary, partner)
        yield ReportSection(f"Served{of_run}", blocks, text)


def find_partner(served: Artifact, rows: Sequence[Mapping[str, Any]]) -> Partner | None:
    """The result in process of the same draft and settings that has most of these prompts."""
    wanted, store = require_info(served), served.store
    prompts, partner, most = {*map(PROMPT, rows)}, None, 0
    for folder in store.names("evaluate"):
        content = store.read_if_there(f"evaluate/{folder}/artifact.json")
        info = ArtifactInfo.model_validate_json(content) if content else None
        if info is None or not _is_alike(info, wanted):
            continue
        artifact = input_artifact(store, info)
        found = read_rows(artifact)
        common = len(prompts & {*map(PROMPT, found)})
        if common > most:
            partner, most = Partner(compute_summary(artifact, found), found), common
    return partner


def _is_alike(info: ArtifactInfo, served: ArtifactInfo) -> bool:
    """Whether it is a result in process whose prompts were decoded as the served ones."""
    settings, wanted = (one.recipe["evaluate"] for one in (info, served))
    drafts = [[entry for entry in one.inputs if entry.stage == "train"] for one in (info, served)]
    same = all(settings.get(key) == wanted[key] for key in ALIKE)
    return "engine" not in settings and same and drafts[0] == drafts[1]


def trained_length(result: Artifact) -> float | None:
    """The draft's acceptance length on held-out samples, as its training measured it."""
    for entry in require_info(result).inputs:
        if entry.stage == "train":
            train = input_artifact(result.store, entry)
            stored = train.store.read_if_there(train.path("metrics.jsonl")) or b""
            lines = [json.loads(line) for line in stored.splitlines()]
            lengths = [line[TRAINED] for line in lines if TRAINED in line]
            return max(lengths, default=None)  # the checkpoint that was kept
    return None


def _acceptance(lines: Sequence[ServedLine], trained: float | None) -> Table:
    rows, strong = list[dict[str, str]](), set[int]()
    for line in lines:
        if line.benchmark is None:
            strong.add(len(rows))
        here, served = line.acceptance_length
        low, high = line.interval or (None, None)
        rows.append(
            {
                "benchmark": line.benchmark or "all rounds",
                "temperature": f"{line.temperature:g}",
                "prompts": f"{line.prompts:,}",
                "trained": "–" if trained is None or line.benchmark else f"{trained:.2f}",
                "in process": f"{here:.2f}",
                "served": f"{served:.2f}",
                "difference": "–" if low is None else f"{low:+.2f} to {high:+.2f}",
                "rounds in process": f"{line.rounds[0]:,}",
                "rounds served": f"{line.rounds[1]:,}",
                "equal answers": f"{line.same_answers:,}/{line.prompts:,}",
                "rounds": "DIFFER" if line.is_finding else "agree",
            }
        )
    return Table("Acceptance: trained, in process, served", rows, 2, frozenset(strong), NOTE)


def _speed(served: EvaluationSummary, partner: Partner | None) -> Iterator[Gallery | Table]:
    """Speed-up by concurrency of every temperature, as a chart and in numbers."""
    charts, rows = [], []
    for temperature, found in served.temperatures.items():
        sides = {"served": _by_size(found.micro.batch_sizes)}
        if partner and temperature in partner.summary.temperatures:
            of_partner = partner.summary.temperatures[temperature].micro
            sides = {"in process": _by_size(of_partner.batch_sizes), **sides}
        series = [
            Series(name, [Point(size, at.speedup, at.interval) for size, at in side.items()], n)
            for n, (name, side) in enumerate(sides.items())
        ]
        labels = ("requests in flight, or prompts decoded together", "speed-up")
        title = f"Temperature {temperature:g}"
        charts.append(line_chart(title, series, labels=labels, x="powers of two", reference=1.0))
        sizes = sorted({size for side in sides.values() for size in side})
        rows += [
            {
                "temperature": f"{temperature:g}",
                "requests": f"{size:,}",
                **_cells("in process", sides.get("in process", {}).get(size)),
                **_cells("served", sides["served"].get(size)),
            }
            for size in sizes
        ]
    yield Gallery("Speed-up by concurrency", charts, SPEED_NOTE)
    yield Table("Speed-up by concurrency, in numbers", rows)


def _by_size(speeds: Sequence[BatchSpeed]) -> dict[int, BatchSpeed]:
    return {speed.batch_size: speed for speed in sorted(speeds, key=lambda at: at.batch_size)}


def _cells(name: str, speed: BatchSpeed | None) -> dict[str, str]:
    rates = speed.tokens_per_s if speed else None
    return {
        f"plain tokens/s {name}": f"{rates.plain:,.0f}" if rates else "–",
        f"tokens/s {name}": f"{rates.speculative:,.0f}" if rates else "–",
        f"speed-up {name}": ranged(speed.speedup, speed.interval) if speed else "–",
    }


def _finding(
    lines: Sequence[ServedLine], partner: Partner, by: ServedBy, dtypes: Dtypes
) -> Finding:
    """What differs, and what may be the reason, the likeliest first."""
    found = [line for line in lines if line.is_finding]
    overall = [line for line in found if line.benchmark is None]
    worst = max(overall or found, key=_difference)
    here, served = worst.acceptance_length
    where = f"{worst.benchmark or 'all benchmarks'}, temperature {worst.temperature:g}"
    what = (
        f"The served draft does not draft as it does in process: {served:.2f} tokens per round "
        f"instead of {here:.2f} ({where}; {worst.rounds[1]:,} rounds instead of "
        f"{worst.rounds[0]:,})."
    )
    return Finding(what, list(_causes(worst, partner, by, dtypes)))


def _difference(line: ServedLine) -> float:
    here, served = line.acceptance_length
    return abs(served - here) / here


def _causes(worst: ServedLine, partner: Partner, by: ServedBy, dtypes: Dtypes) -> Iterator[str]:
    here, served = worst.acceptance_length
    proposed = max((n for row in partner.rows for n in row["proposed"]), default=0)
    if by.num_speculative_tokens != proposed:
        yield (
            f"The server proposes {by.num_speculative_tokens} tokens per round, in process it is "
            f"{proposed}: num_speculative_tokens of its --speculative-config."
        )
    if served - 1 < NEXT_TO_NOTHING * (here - 1):
        yield (
            "Next to nothing is accepted: another block layout or other captured layers than the "
            "draft was trained with, or the draft of another target. Export it again."
        )
    if worst.temperature > 0 and by.draft_sampling == "greedy":
        yield (
            "The server takes the draft's likeliest tokens, in process they are drawn: "
            "evaluate.draft_sampling=probabilistic."
        )
    if dtypes[0] != dtypes[1]:
        formats = " and ".join(name or "an unknown one" for name in dtypes)
        yield f"The number formats differ: {formats} (in process, served)."
    if worst.temperature == 0 and worst.same_answers < worst.prompts:
        differ = worst.prompts - worst.same_answers
        yield (
            f"{differ:,} of {worst.prompts:,} answers differ from those in process: the server's "
            "target may be quantised, another revision, or of another number format."
        )
    yield (
        "The engine may compute the draft in another way than it was trained: another rotary "
        "embedding, a lower number format of its weights, attention of another kind. Compare with "
        "the engine and version that docs/serving.md lists."
    )
