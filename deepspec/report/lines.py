"""What the tables and figures of a report have in common.

The results, and a line for each benchmark, domain and total with its numbers in every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from deepspec.artifacts.results import EvaluationSummary, MeanMetrics, Metrics
from deepspec.figures.picture import Key

Part = Metrics | MeanMetrics


class Result(NamedTuple):
    """A result as the report shows it.

    `summary` is computed from its rows, and has what the evaluation added to it.
    """

    label: str
    summary: EvaluationSummary
    settings: Mapping[str, Any]
    lineage: Sequence[str]
    sealed: bool
    left_out: int
    """Prompts (or turns) that were not decoded, once for each time that they would have been."""


class Line(NamedTuple):
    """A benchmark, a domain or a total: its part of each result, None where there is none."""

    name: str
    domain: str
    parts: list[Part | None]
    is_overall: bool = False

    @property
    def pooled(self) -> list[Metrics | None]:
        """The parts with rounds and seconds of their own: macro means have none."""
        return [part if isinstance(part, Metrics) else None for part in self.parts]

    @property
    def has_positions(self) -> bool:
        """Whether acceptance by position is known."""
        return any(part and part.tried for part in self.pooled)

    @property
    def has_speeds(self) -> bool:
        """Whether speed by batch size is known."""
        return any(self.pooled)


def lines_of(results: Sequence[Result], temperature: float) -> list[Line]:
    """The benchmarks of one temperature, then domains if they are fewer, then micro and macro."""
    overall = [result.summary.temperatures[temperature] for result in results]
    of_benchmarks = [
        {
            part.benchmark: part
            for part in result.summary.benchmarks
            if part.temperature == temperature
        }
        for result in results
    ]
    of_domains = [{part.domain: part for part in found.domains} for found in overall]
    names = list(dict.fromkeys(name for found in of_benchmarks for name in found))
    domains = list(dict.fromkeys(name for found in of_domains for name in found))
    lines = []
    for name in names:
        parts = [found.get(name) for found in of_benchmarks]
        lines.append(Line(name, next(part.domain for part in parts if part), [*parts]))
    if len(domains) < len(names):
        for name in domains:
            pooled: list[Part | None] = [found.get(name) for found in of_domains]
            lines.append(Line(f"all {name}", name, pooled, is_overall=True))
    micro, macro = [found.micro for found in overall], [found.macro for found in overall]
    lines.append(Line("micro (all rounds)", "", [*micro], is_overall=True))
    lines.append(Line("macro (mean of benchmarks)", "", [*macro], is_overall=True))
    return lines


def totals_first(lines: Sequence[Line]) -> list[Line]:
    """The lines in the order of figures: micro, then the domains, then the benchmarks."""
    return sorted(lines, key=lambda line: (not line.is_overall, not line.name.startswith("micro")))


def rows_of(
    lines: Sequence[Line], results: Sequence[Result]
) -> Iterator[tuple[list[str], Part, Line]]:
    """A row's first cells, its numbers and its line; of several runs, the cells name it."""
    for line in lines:
        for result, part in zip(results, line.parts, strict=True):
            if part is not None:
                yield [line.name, *([result.label] if len(results) > 1 else [])], part, line


def first_columns(results: Sequence[Result]) -> list[str]:
    """The headers of the cells that `rows_of` begins a row with."""
    return ["benchmark", *(["run"] if len(results) > 1 else [])]


def run_keys(results: Sequence[Result]) -> list[Key]:
    """A legend with a colour for each run."""
    return [Key(result.label, colour) for colour, result in enumerate(results)]


def ranged(value: float, interval: Sequence[float] | None) -> str:
    """`2.31 (2.20–2.42)`."""
    return f"{value:.2f} ({interval[0]:.2f}–{interval[1]:.2f})" if interval else f"{value:.2f}"
