"""What a report says of confidence and of the prefix scheduler, where a result has it, and of
where results come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deepspec.figures.drawing import Figure, Point, Series, from_zero, line_figure
from deepspec.figures.picture import Key
from deepspec.report.acceptance import Result
from deepspec.report.page import Gallery, Listing, Section, Table

BEFORE, AFTER = 7, 0  # colours
SIDES = {"before": BEFORE, "after": AFTER}
MOST_COLOURS = 8
FIFTHS = [number / 5 for number in range(6)]


def calibration_sections(results: Sequence[Result]) -> Iterator[Section]:
    having = [result for result in results if result.summary.get("calibration")]
    for result in having:
        found = result.summary["calibration"]
        of_run = f" of {result.label}" if len(results) > 1 else ""
        blocks: list[Table | Gallery] = []
        for title, name in (
            ("each position", "positions"),
            ("the cumulative product", "cumulative"),
        ):
            if found.get(name):
                keys = [Key("before", BEFORE), Key("after temperature scaling", AFTER)]
                blocks.append(
                    Gallery(
                        f"Reliability of {title}",
                        keys,
                        [_reliability(title, part) for part in found[name]],
                    )
                )
                blocks.append(
                    _calibration_table(title, found[name], found.get("temperatures") or [])
                )
        text = "How often the target accepted a draft token, against the draft's confidence in it. On the dotted line both are the same."
        if found.get("fitted_on") and found.get("reported_on"):
            text += " Temperatures were fitted on {prompts:,} prompts ({rounds:,} rounds)".format(
                **found["fitted_on"]
            )
            text += " and are told of {prompts:,} others ({rounds:,} rounds).".format(
                **found["reported_on"]
            )
        yield Section(f"Confidence{of_run}", blocks, text)
    if swept := [result for result in having if result.summary["calibration"].get("thresholds")]:
        yield _threshold_section(
            swept, colours={result.label: colour for colour, result in enumerate(results)}
        )


def _reliability(title: str, part: Mapping[str, Any]) -> Figure:
    series = []
    for side, colour in SIDES.items():
        bins = [one for one in (part.get(side) or {}).get("bins", []) if one["count"]]
        most = max((one["count"] for one in bins), default=1)
        points = [
            Point(
                one["confidence"],
                one["accepted"],
                radius=1.5 + 3 * (one["count"] / most) ** 0.5,
                note=f"{side}: confidence {one['confidence']:.2f}, accepted {one['accepted']:.2f} of {one['count']:,}",
            )
            for one in bins
        ]
        series.append(Series(points, colour))
    words = f"Position {part['position']}" + (" (product)" if "product" in title else "")
    return line_figure(
        words,
        series,
        labels=("confidence", "accepted"),
        x=FIFTHS,
        y=(0.0, 1.0),
        reference="diagonal",
    )


def _calibration_table(
    title: str, parts: Sequence[Mapping[str, Any]], temperatures: Sequence[float]
) -> Table:
    rows = []
    for number, part in enumerate(parts):
        scores = [
            _score((part.get(side) or {}).get(score))
            for score in ("ece", "auroc", "brier")
            for side in SIDES
        ]
        count = (part.get("after") or part.get("before") or {}).get("count", 0)
        temperature = f"{temperatures[number]:.2f}" if number < len(temperatures) else "–"
        rows.append([f"{part['position']}", f"{count:,}", temperature, *scores])
    header = [
        "position",
        "labels",
        "temperature",
        *(f"{score} {side}" for score in ("ECE", "AUROC", "Brier") for side in SIDES),
    ]
    return Table(f"Calibration of {title}", header, rows)


def _threshold_section(results: Sequence[Result], colours: Mapping[str, int]) -> Section:
    measures = {
        "acceptance_length": "acceptance length",
        "verify_rate": "verify rate",
        "proposed_per_round": "proposed per round",
    }
    figures, rows = [], []
    for name, words in measures.items():
        series = []
        for result in results:
            sweep = result.summary["calibration"]["thresholds"]
            points = [
                Point(
                    at["threshold"],
                    at[name],
                    note=f"{result.label}, {at['threshold']:.2f}: {at[name]:.2f}",
                )
                for at in sweep
            ]
            series.append(Series(points, colours[result.label]))
        figures.append(
            line_figure(words[0].upper() + words[1:], series, labels=("threshold", words), x=FIFTHS)
        )
    for result in results:
        for at in result.summary["calibration"]["thresholds"]:
            rows.append(
                [result.label, f"{at['threshold']:.2f}", *(f"{at[name]:.2f}" for name in measures)]
            )
    keys = [Key(result.label, colours[result.label]) for result in results]
    text = "What cutting each block at the first confidence below a threshold would have done, replayed on recorded full rounds."
    table = Table("Threshold sweep, in numbers", ["run", "threshold", *measures.values()], rows)
    return Section("Thresholds", [Gallery("Threshold sweep", keys, figures), table], text)


def scheduler_sections(results: Sequence[Result]) -> Iterator[Section]:
    for result in results:
        if not (found := result.summary.get("scheduler")):
            continue
        of_run = f" of {result.label}" if len(results) > 1 else ""
        policies = dict(
            sorted(found["policies"].items(), key=lambda item: item[0].startswith("fixed@"))
        )
        named = [name for name in policies if not name.startswith("fixed@")]
        named = named if len(named) <= MOST_COLOURS else [name for name in named if "@" not in name]
        series, keys = [], [Key(name, colour) for colour, name in enumerate(named)]
        for name, steps in policies.items():
            points = [
                Point(
                    at["per_user"],
                    at["throughput"],
                    note=f"{name}, {at['requests']} requests: {at['throughput']:,.0f} tokens/s",
                )
                for at in steps
            ]
            faint = name not in named
            series.append(Series(points, 0 if faint else named.index(name), faint=faint))
        fastest = max((at["per_user"] for steps in policies.values() for at in steps), default=1.0)
        labels = ("tokens/s of one request", "tokens/s of all")
        figure = line_figure(
            "Throughput against speed per user",
            sorted(series, key=lambda one: not one.faint),
            labels=labels,
            x=from_zero(fastest),
        )
        rows = [
            [
                name,
                f"{at['requests']:,}",
                f"{at['throughput']:,.1f}",
                f"{at['per_user']:,.1f}",
                _score(at.get("verified_per_round"), 2),
            ]
            for name, steps in policies.items()
            for at in steps
        ]
        table = Table(
            "Policies, in numbers",
            ["policy", "requests", "tokens/s", "tokens/s per user", "verified per round"],
            rows,
        )
        note = (
            "Thin lines: the other policies below, fixed lengths among them."
            if len(named) < len(policies)
            else ""
        )
        text = "Recorded rounds replayed at several numbers of concurrent requests: further up and to the right is better."
        yield Section(
            f"Scheduler{of_run}", [Gallery("Policies", keys, [figure], note), table], text
        )


def origin_sections(results: Sequence[Result]) -> Iterator[Section]:
    yield Section(
        "Lineage",
        [Listing(result.label, result.lineage) for result in results],
        "What each result was made from, itself first.",
    )
    flat = [dict(flattened(result.settings)) for result in results]
    names = list(dict.fromkeys(name for found in flat for name in found))
    rows: list[list[str]] = []
    strong = set()
    for name in names:
        values = [found.get(name, "–") for found in flat]
        if len(set(values)) > 1:
            strong.add(len(rows))
        rows.append([name, *values])
    differ = "Settings in which the runs differ stand out." if len(results) > 1 else ""
    header = ["setting", *(result.label for result in results)]
    yield Section(
        "Settings",
        [
            Table(
                "Every setting",
                header,
                rows,
                words=len(header),
                strong=frozenset(strong),
                note=differ,
            )
        ],
    )


def flattened(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """`train.lr`, `0.001`: every value of nested settings by its path."""
    if isinstance(settings, Mapping) and settings:
        for name, value in settings.items():
            yield from flattened(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(settings, list) and any(isinstance(item, Mapping) for item in settings):
        for number, item in enumerate(settings):
            yield from flattened(item, f"{prefix}.{number}")
    else:
        yield prefix, "null" if settings is None else str(settings)


def _score(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
