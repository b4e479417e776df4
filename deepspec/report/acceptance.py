"""What a report says of acceptance and speed: one section per temperature, several runs side by
side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from deepspec.figures.drawing import (
    Figure,
    Point,
    Series,
    bar_figure,
    interval_figure,
    line_figure,
    powers,
)
from deepspec.figures.picture import Key
from deepspec.report.page import Gallery, Section, Table

PHASES = {
    "draft_seconds": "draft",
    "verify_seconds": "verify",
    "bookkeeping_seconds": "bookkeeping",
}
PLAIN = 7  # the colour of plain decoding
Part = Mapping[str, Any]


class Result(NamedTuple):
    """A result as the report shows it: `summary` computed from its rows, with what the
    evaluation added to it.
    """

    label: str
    summary: Mapping[str, Any]
    settings: Mapping[str, Any]
    lineage: Sequence[str]
    sealed: bool
    left_out: int
    """Prompts (or turns) that were not decoded, once for each time that they would have been."""


def temperature_sections(results: Sequence[Result]) -> Iterator[Section]:
    keys = list(dict.fromkeys(key for result in results for key in result.summary["temperatures"]))
    for key in keys:
        of_this = [result for result in results if key in result.summary["temperatures"]]
        lines = _lines(of_this, key)
        blocks: list[Table | Gallery] = [
            _summary_table(lines, of_this),
            _intervals(lines, of_this),
            _lossless_table(of_this, key),
        ]
        blocks += [
            _curves(lines, of_this),
            _position_table(lines, of_this),
            *_speed(lines, of_this),
        ]
        yield Section(f"Temperature {float(key):g}", blocks)


class Line(NamedTuple):
    """One row of the tables: a benchmark, a domain or all of them, in each run (None where a
    run has no such part).
    """

    name: str
    domain: str
    parts: list[Part | None]
    is_overall: bool = False


def _lines(results: Sequence[Result], key: str) -> list[Line]:
    """Benchmarks, then domains where they say more, then micro and macro."""
    overall = [result.summary["temperatures"][key] for result in results]
    of_benchmarks = [
        {
            part["benchmark"]: part
            for part in result.summary["benchmarks"]
            if part["temperature"] == float(key)
        }
        for result in results
    ]
    of_domains = [{part["domain"]: part for part in found["domains"]} for found in overall]
    names = list(dict.fromkeys(name for found in of_benchmarks for name in found))
    domains = list(dict.fromkeys(name for found in of_domains for name in found))
    lines = []
    for name in names:
        parts = [found.get(name) for found in of_benchmarks]
        lines.append(Line(name, next(part["domain"] for part in parts if part), parts))
    if len(domains) < len(names):
        lines += [
            Line(f"all {name}", name, [found.get(name) for found in of_domains], is_overall=True)
            for name in domains
        ]
    lines.append(
        Line("micro (all rounds)", "", [found["micro"] for found in overall], is_overall=True)
    )
    lines.append(
        Line(
            "macro (mean of benchmarks)", "", [found["macro"] for found in overall], is_overall=True
        )
    )
    return lines


def _rows(
    lines: Sequence[Line], results: Sequence[Result]
) -> Iterator[tuple[list[str], Part, Line]]:
    """The words that a row begins with, what it is about, and its line; the run is named where
    there are several.
    """
    for line in lines:
        for result, part in zip(results, line.parts, strict=True):
            if part is not None:
                yield [line.name, *([result.label] if len(results) > 1 else [])], part, line


def _named(results: Sequence[Result]) -> list[str]:
    return ["benchmark", *(["run"] if len(results) > 1 else [])]


def _summary_table(lines: Sequence[Line], results: Sequence[Result]) -> Table:
    rows: list[list[str]] = []
    strong = set()
    for words, part, line in _rows(lines, results):
        if line.is_overall:
            strong.add(len(rows))
        speeds = part.get("tokens_per_s")
        rows.append(
            [
                *words,
                line.domain,
                f"{part['prompts']:,}" if "prompts" in part else "",
                f"{part['rounds']:,}" if "rounds" in part else "",
                ranged(part["acceptance_length"], part["intervals"]["acceptance_length"]),
                ranged(part["verify_rate"], part["intervals"]["verify_rate"]),
                f"{speeds['plain']:,.0f}" if speeds else "",
                f"{speeds['speculative']:,.0f}" if speeds else "",
                ranged(part["speedup"], part["intervals"]["speedup"]),
            ]
        )
    header = [
        *_named(results),
        "domain",
        "prompts",
        "rounds",
        "acceptance length",
        "verify rate",
        "plain tokens/s",
        "tokens/s",
        "speed-up",
    ]
    note = (
        "Acceptance length: tokens committed per round, the target's bonus token included. Verify rate: committed tokens of all "
        "verified positions. In brackets 95 % bootstrap intervals: over prompts, of the speed-up over groups decoded together. "
        "Speed is that of the first batch size."
    )
    return Table(
        "Acceptance and speed",
        header,
        rows,
        words=len(_named(results)) + 1,
        strong=frozenset(strong),
        note=note,
    )


def _intervals(lines: Sequence[Line], results: Sequence[Result]) -> Gallery:
    figures = []
    for title, name, reference in (
        ("Acceptance length", "acceptance_length", 1.0),
        ("Speed-up over plain decoding", "speedup", 1.0),
    ):
        rows: list[tuple[str, list[Point | None]]] = []
        for line in lines:
            points: list[Point | None] = []
            for result, part in zip(results, line.parts, strict=True):
                found = part["intervals"][name] if part else None
                note = f"{line.name}, {result.label}: {ranged(part[name], found)}" if part else ""
                points.append(Point(part[name], 0.0, found, note) if part else None)
            rows.append((line.name.partition(" (")[0], points))
        unit = "tokens per round" if name == "acceptance_length" else "times as fast"
        figures.append(interval_figure(title, rows, label=unit, reference=reference))
    return Gallery("By benchmark", run_keys(results), figures)


def _lossless_table(results: Sequence[Result], key: str) -> Table:
    rows = []
    for result in results:
        found = result.summary["temperatures"][key]["losslessness"]
        verdict = {True: "yes", False: "NO", None: "not by these counts"}[found["ok"]]
        regret = "" if found["max_regret"] is None else f"{found['max_regret']:.3g}"
        cells = [
            result.label,
            found["dtype"] or "unknown",
            verdict,
            found["words"],
            f"{found['identical']}/{found['prompts']}",
            regret,
        ]
        rows.append(cells)
    return Table(
        "Losslessness",
        ["run", "number format", "shown", "what is known", "identical", "largest regret"],
        rows,
        words=4,
    )


def _curves(lines: Sequence[Line], results: Sequence[Result]) -> Gallery:
    figures = [figure for line in _with_positions(lines) if (figure := _curve(line, results))]
    keys = run_keys(results)
    both = [Key(f"{key.name}: conditional", key.colour) for key in keys] + [
        Key(f"{key.name}: prefix", key.colour, dashed=True) for key in keys
    ]
    note = (
        "Conditional acceptance at k (solid): of the rounds that accepted the first k - 1 draft tokens, those that accepted the k-th. "
        "Prefix acceptance at k (dashed): rounds that accepted all of the first k. Shaded: 95 % intervals."
    )
    return Gallery("Acceptance by position", both, figures, note)


def _with_positions(lines: Sequence[Line]) -> list[Line]:
    return sorted(
        (line for line in lines if any(part and part.get("tried") for part in line.parts)),
        key=_importance,
    )


def _importance(line: Line) -> int:
    return 0 if line.name.startswith("micro") else 1 if line.is_overall else 2


def _curve(line: Line, results: Sequence[Result]) -> Figure | None:
    series = []
    longest = max(len(part["tried"]) for part in line.parts if part)
    for colour, (result, part) in enumerate(zip(results, line.parts, strict=True)):
        for name, counted in (
            ("prefix_acceptance", "reached"),
            ("conditional_acceptance", "tried"),
        ):
            if part is None:
                continue
            found = zip(part[name], part["intervals"][name], part[counted], strict=True)
            words = f"{result.label}, {name.partition('_')[0]} at"
            points = [
                Point(k, value, known, f"{words} {k}: {ranged(value, known)}")
                for k, (value, known, count) in enumerate(found, start=1)
                if count
            ]
            series.append(Series(points, colour, dashed=name == "prefix_acceptance"))
    if not longest:
        return None
    return line_figure(
        line.name,
        series,
        labels=("position in the block", "accepted"),
        x=range(1, longest + 1),
        y=(0.0, 1.0),
    )


def _position_table(lines: Sequence[Line], results: Sequence[Result]) -> Table:
    longest = max(
        (len(part["tried"]) for line in lines for part in line.parts if part and "tried" in part),
        default=0,
    )
    rows = []
    for words, part, _ in _rows(_with_positions(lines), results):
        for name, counted in (
            ("conditional_acceptance", "tried"),
            ("prefix_acceptance", "reached"),
        ):
            found = zip(part[name], part["intervals"][name], part[counted], strict=True)
            cells = [ranged(value, known) if count else "–" for value, known, count in found]
            rows.append([*words, name.partition("_")[0], *cells, *["–"] * (longest - len(cells))])
    header = [*_named(results), "acceptance", *(f"k = {k}" for k in range(1, longest + 1))]
    return Table("Acceptance by position, in numbers", header, rows, words=len(_named(results)) + 1)


def _speed(lines: Sequence[Line], results: Sequence[Result]) -> Iterator[Table | Gallery]:
    """Speed-up against batch size where there are several, seconds by phase, and both as a
    table.
    """
    timed = [line for line in lines if any(part and "batch_sizes" in part for part in line.parts)]
    sizes = sorted(
        {
            size["batch_size"]
            for line in timed
            for part in line.parts
            if part
            for size in part["batch_sizes"]
        }
    )
    if len(sizes) > 1:
        highest = max(
            max(size["interval"] or [size["speedup"]])
            for line in timed
            for part in line.parts
            if part
            for size in part["batch_sizes"]
        )
        figures = [
            _by_batch_size(line, results, sizes, max(1.0, highest) * 1.05)
            for line in sorted(timed, key=_importance)
        ]
        note = "Speed-up over plain decoding at the same batch size, with its 95 % interval."
        yield Gallery("Speed-up by batch size", run_keys(results), figures, note)
    keys = [
        Key("plain decoding", PLAIN),
        *(Key(words, colour) for colour, words in enumerate(PHASES.values())),
    ]
    pooled = next(line for line in timed if line.name.startswith("micro"))
    bars = [
        _phases(result, part) for result, part in zip(results, pooled.parts, strict=True) if part
    ]
    yield Gallery(
        "Seconds by phase",
        keys,
        bars,
        "Seconds of plain and of speculative decoding of the same prompts, all benchmarks together.",
    )
    rows = [
        [*words, *_speed_cells(size)]
        for words, part, _ in _rows(timed, results)
        for size in part["batch_sizes"]
    ]
    header = [
        *_named(results),
        "batch",
        "prompts",
        "groups",
        "plain tokens/s",
        "tokens/s",
        "speed-up",
        "plain s",
        "speculative s",
    ]
    header += [f"{name} s" for name in PHASES.values()]
    yield Table("Speed by batch size, and seconds by phase", header, rows, len(_named(results)))


def _speed_cells(size: Mapping[str, Any]) -> list[str]:
    counts = [f"{size[name]:,}" for name in ("batch_size", "prompts", "groups")]
    speeds = [f"{size['tokens_per_s'][way]:,.0f}" for way in ("plain", "speculative")]
    seconds = [f"{size['seconds'][name]:.1f}" for name in ("plain_seconds", "seconds", *PHASES)]
    return [*counts, *speeds, ranged(size["speedup"], size["interval"]), *seconds]


def _by_batch_size(
    line: Line, results: Sequence[Result], sizes: Sequence[int], highest: float
) -> Figure:
    series = []
    for colour, (result, part) in enumerate(zip(results, line.parts, strict=True)):
        found = part["batch_sizes"] if part else []
        points = []
        for size in sorted(found, key=lambda size: size["batch_size"]):
            note = f"{result.label}, batch {size['batch_size']}: {ranged(size['speedup'], size['interval'])}"
            points.append(Point(size["batch_size"], size["speedup"], size["interval"], note))
        series.append(Series(points, colour))
    return line_figure(
        line.name,
        series,
        labels=("prompts decoded together", "speed-up"),
        x=powers(sizes),
        y=(0.0, highest),
        reference=1.0,
    )


def _phases(result: Result, part: Part) -> Figure:
    rows = []
    for size in part["batch_sizes"]:
        rows.append(
            (
                f"{size['batch_size']} plain",
                [("plain decoding", size["seconds"]["plain_seconds"], PLAIN)],
            )
        )
        phases = [
            (words, size["seconds"][name], colour)
            for colour, (name, words) in enumerate(PHASES.items())
        ]
        rows.append((f"{size['batch_size']} speculative", phases))
    return bar_figure(result.label, rows, label="seconds")


def run_keys(results: Sequence[Result]) -> list[Key]:
    return [Key(result.label, colour) for colour, result in enumerate(results)]


def ranged(value: float, interval: Sequence[float] | None) -> str:
    """`2.31 (2.20 to 2.42)`."""
    return f"{value:.2f} ({interval[0]:.2f}–{interval[1]:.2f})" if interval else f"{value:.2f}"
