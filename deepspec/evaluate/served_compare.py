"""A served result beside the one in process of the same draft: the same rounds, or why not."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from deepspec.artifacts.results import Interval
from deepspec.evaluate.compare import ComparedLine, Pair, compare, match
from deepspec.evaluate.counts import Rows, drawn_by
from deepspec.evaluate.summary import grouped

TOLERANCE = 0.02
"""Share of the acceptance length that two kernels' rounding may move it by."""
FLOAT32 = ("float32", "float32")


class ServedLine(NamedTuple):
    """One benchmark at one temperature, or all of them (`benchmark` is None); of each pair of
    numbers the first is that in process, the second the served one.
    """

    temperature: float
    benchmark: str | None
    prompts: int
    same_answers: int  # token for token
    rounds: tuple[int, int]
    tokens: tuple[int, int]
    acceptance_length: tuple[float, float]
    interval: Interval | None  # of the difference
    is_finding: bool  # whether the rounds differ by more than rounding explains


def served_lines(
    here: Rows, served: Rows, dtypes: tuple[str | None, str | None]
) -> list[ServedLine]:
    """What the two have in common, per temperature: its benchmarks, then all of them.

    Of a group whose rounds the engine counted together, all prompts must be in both; no line where
    nothing is. `dtypes` are the number formats of both.
    """
    here, served = (_first_size(rows) for rows in (here, served))
    pairs = list(_comparable(match(here, served), served))
    if not pairs:
        return []
    found = compare([a for a, _ in pairs], [b for _, b in pairs])
    return [
        _line(line, [pair for pair in pairs if _belongs(pair, line)], dtypes)
        for line in found.acceptance
        if line.overall != "macro"
    ]


def _first_size(rows: Rows) -> Rows:
    return next(iter(grouped(rows, itemgetter("batch_size")).values()), [])


def _comparable(pairs: Sequence[Pair], served: Rows) -> Iterator[Pair]:
    """The pairs of whole groups: the engine's rounds of a group stand in its first row."""
    group = itemgetter("temperature", "benchmark", "group", "turn")
    if drawn_by(served) == "prompt":
        yield from pairs
        return
    sizes = Counter(map(group, served))
    for key, of_group in grouped(pairs, lambda pair: group(pair[1])).items():
        if len(of_group) == sizes[key]:
            yield from of_group


def _belongs(pair: Pair, line: ComparedLine) -> bool:
    return pair[0]["temperature"] == line.temperature and (
        line.benchmark is None or pair[0]["benchmark"] == line.benchmark
    )


def _line(
    line: ComparedLine, pairs: Sequence[Pair], dtypes: tuple[str | None, str | None]
) -> ServedLine:
    same = sum(here["token_ids"] == served["token_ids"] for here, served in pairs)
    rounds, tokens = (
        (sum(map(count, (here for here, _ in pairs))), sum(map(count, (row for _, row in pairs))))
        for count in (_num_rounds, itemgetter("num_tokens"))
    )
    if line.temperature == 0 and dtypes == FLOAT32:
        is_finding = same < len(pairs) or rounds[0] != rounds[1]
    else:
        moved = abs(line.difference) > TOLERANCE * line.a
        within = line.interval is not None and line.interval[0] <= 0 <= line.interval[1]
        is_finding = moved and not within
    return ServedLine(
        line.temperature,
        line.benchmark,
        len(pairs),
        same,
        rounds,
        tokens,
        (line.a, line.b),
        line.interval,
        is_finding,
    )


def _num_rounds(row: Mapping[str, Any]) -> int:
    return len(row["proposed"])
