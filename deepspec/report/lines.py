"""What the tables and charts of a report have in common.

The results, and a line for each benchmark, domain and total with its numbers in every run.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.results import EvaluationSummary, MeanMetrics, Metrics

Part = Metrics | MeanMetrics
P_co = TypeVar("P_co", bound=Part, covariant=True)


class Result(NamedTuple):
    """A result as the report shows it.

    `summary` is computed from its rows, and has what the evaluation added to it.
    """

    label: str
    summary: EvaluationSummary
    artifact: Artifact


class Line(NamedTuple, Generic[P_co]):
    """A benchmark, a domain or a total: its part of each result by label, None where there is none.

    A result's place among them is its colour.
    """

    name: str
    domain: str
    parts: Mapping[str, P_co | None]
    is_overall: bool = False


def lines_of(results: Sequence[Result], temperature: float) -> list[Line[Metrics]]:
    """The benchmarks of one temperature, then domains if they are fewer, then all rounds."""
    overall = {result.label: result.summary.temperatures[temperature] for result in results}
    benchmarks = {
        result.label: {
            part.benchmark: part
            for part in result.summary.benchmarks
            if part.temperature == temperature
        }
        for result in results
    }
    domain_of = {name: part.domain for found in benchmarks.values() for name, part in found.items()}
    lines: list[Line[Metrics]] = [
        Line(name, domain, {label: found.get(name) for label, found in benchmarks.items()})
        for name, domain in domain_of.items()
    ]
    names = list(dict.fromkeys(domain_of.values()))
    if len(names) < len(lines):
        for name in names:
            parts = {
                label: next((part for part in found.domains if part.domain == name), None)
                for label, found in overall.items()
            }
            lines.append(Line(f"all {name}", name, parts, is_overall=True))
    micro = {label: found.micro for label, found in overall.items()}
    return [*lines, Line("micro (all rounds)", "", micro, is_overall=True)]


def macro_line(results: Sequence[Result], temperature: float) -> Line[MeanMetrics]:
    """The means over the benchmarks of one temperature."""
    macro = {result.label: result.summary.temperatures[temperature].macro for result in results}
    return Line("macro (mean of benchmarks)", "", macro, is_overall=True)


def totals_first(lines: Sequence[Line[Metrics]]) -> list[Line[Metrics]]:
    """The lines in the order of charts: micro, then the domains, then the benchmarks."""
    return sorted(lines, key=lambda line: (not line.is_overall, not line.name.startswith("micro")))


def rows_of(lines: Sequence[Line[P_co]]) -> Iterator[tuple[dict[str, str], P_co, Line[P_co]]]:
    """A row's first cells, its numbers and its line; of several runs, the cells name it."""
    for line in lines:
        for label, part in line.parts.items():
            if part is not None:
                run = {"run": label} if num_words(line) > 1 else {}
                yield {"benchmark": line.name, **run}, part, line


def num_words(line: Line[P_co]) -> int:
    """How many cells `rows_of` begins a row with."""
    return min(len(line.parts), 2)
