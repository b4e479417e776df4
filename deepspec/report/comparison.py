"""A comparison of two results as it is shown: what was matched, the tables, and the settings in
which the two differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from deepspec.evaluate.compare import compare
from deepspec.evaluate.results import read_rows
from deepspec.report.confidence import flattened
from deepspec.report.page import Table, for_terminal
from deepspec.report.report import labels_of, open_results

UNIMPORTANT = ("name", "store", "resources")  # of a run: no result depends on them


def compare_results(
    a: str, b: str, overrides: Sequence[str] = (), *, store: str | None = None
) -> dict[str, Any]:
    """Two runs or result folders compared; beside the numbers who they are, and the settings that
    differ.

    Raises:
        ArtifactMismatch: one of them is no result, or they have no prompt in common.
    """
    artifacts = open_results([a, b], overrides, store=store)
    found = compare(*(read_rows(artifact) for artifact in artifacts))
    names = [
        {"name": label, "url": artifact.url}
        for label, artifact in zip(labels_of(artifacts), artifacts, strict=True)
    ]
    infos = [artifact.info() for artifact in artifacts]
    return {
        "a": names[0],
        "b": names[1],
        "settings": _differences(*(info.run if info else {} for info in infos)),
        **found,
    }


def tables(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    a, b = found["a"]["name"], found["b"]["name"]
    only_a, only_b = found["unmatched"]
    yield f"A  {a}  {found['a']['url']}\nB  {b}  {found['b']['url']}"
    yield f"{found['matched']:,} prompts are in both; {only_a:,} only in A, {only_b:,} only in B are left out"
    header = ["benchmark", "T", "prompts", "A", "B", "B - A", "95 % interval", "B better in"]
    note = "resampled: prompts, both sides of each together; T: temperature; B better in: share of the resamples"
    rows = [[*_named(line), f"{line['prompts']:,}", *_cells(line)] for line in found["acceptance"]]
    yield for_terminal(
        Table("acceptance length", header, rows, strong=_overall(found["acceptance"]), note=note)
    )
    if found["speed"]:
        header = ["benchmark", "T", "batch", "groups", *header[3:]]
        rows = [
            [*_named(line), f"{line['batch_size']}", f"{line['groups']:,}", *_cells(line)]
            for line in found["speed"]
        ]
        note = "resampled: groups of prompts that A decoded together"
        yield for_terminal(
            Table(
                "speed-up over plain decoding",
                header,
                rows,
                strong=_overall(found["speed"]),
                note=note,
            )
        )
    if found["settings"]:
        differing = [[name, *map(str, values)] for name, values in found["settings"].items()]
        yield for_terminal(Table("settings that differ", ["setting", "A", "B"], differing, words=3))


def _named(line: Mapping[str, Any]) -> list[str]:
    return [
        line["benchmark"] if "benchmark" in line else line["overall"],
        f"{line['temperature']:g}",
    ]


def _cells(line: Mapping[str, Any]) -> list[str]:
    interval = (
        "unknown" if line["interval"] is None else "{:+.3f} to {:+.3f}".format(*line["interval"])
    )
    above = "unknown" if line["above_zero"] is None else f"{line['above_zero']:.1%}"
    return [f"{line['a']:.3f}", f"{line['b']:.3f}", f"{line['difference']:+.3f}", interval, above]


def _overall(lines: Sequence[Mapping[str, Any]]) -> frozenset[int]:
    return frozenset(number for number, line in enumerate(lines) if "overall" in line)


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """Both values of every setting that differs, by its path; None where a run has no such
    setting.
    """
    flat = [
        dict(flattened({name: value for name, value in run.items() if name not in UNIMPORTANT}))
        for run in (a, b)
    ]
    names = list(dict.fromkeys(name for found in flat for name in found))
    return {
        name: [found.get(name) for found in flat]
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    }
