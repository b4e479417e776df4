"""A comparison of two results as it is printed: matches, numbers, and the settings that differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from deepspec.evaluate.compare import compare
from deepspec.evaluate.results import read_rows
from deepspec.report.origin import flattened
from deepspec.report.page import Table, for_terminal
from deepspec.report.report import labels_of, open_results

UNIMPORTANT = ("name", "store", "resources")  # of a run: no result depends on them
COLUMNS = ["A", "B", "B - A", "95 % interval", "B better in"]
ACCEPTANCE_NOTE = (
    "resampled: prompts, both sides of each together; T: temperature; "
    "B better in: share of the resamples"
)
SPEED_NOTE = "resampled: groups of prompts that A decoded together"


def compare_results(
    a: str, b: str, overrides: Sequence[str] = (), *, store: str | None = None
) -> dict[str, Any]:
    """Two runs or result folders compared: their names, their numbers and the settings that differ.

    Raises:
        ArtifactMismatch: one of them is no result, or they have no prompt in common.
    """
    artifacts = open_results([a, b], overrides, store=store)
    infos = [artifact.info() for artifact in artifacts]
    names = [
        {"name": label, "url": artifact.url}
        for label, artifact in zip(labels_of(artifacts), artifacts, strict=True)
    ]
    return {
        "a": names[0],
        "b": names[1],
        "settings": _differences(*(info.run if info else {} for info in infos)),
        **compare(*map(read_rows, artifacts)),
    }


def comparison_tables(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The comparison for a terminal, one table after another."""
    only_a, only_b = found["unmatched"]
    yield "\n".join(f"{side.upper()}  {found[side]['name']}  {found[side]['url']}" for side in "ab")
    yield (
        f"{found['matched']:,} prompts are in both; "
        f"{only_a:,} only in A, {only_b:,} only in B are left out"
    )
    yield _table("acceptance length", found["acceptance"], ACCEPTANCE_NOTE)
    if found["speed"]:
        yield _table("speed-up over plain decoding", found["speed"], SPEED_NOTE)
    if found["settings"]:
        rows = [[name, *map(str, values)] for name, values in found["settings"].items()]
        yield for_terminal(Table("settings that differ", ["setting", "A", "B"], rows, words=3))


def _table(title: str, lines: Sequence[Mapping[str, Any]], note: str) -> RenderableType:
    """Lines of acceptance count prompts; lines of speed have a batch size and count groups."""
    is_speed = "batch_size" in lines[0]
    rows = []
    for line in lines:
        counts = [line["batch_size"], line["groups"]] if is_speed else [line["prompts"]]
        name = line.get("benchmark") or line["overall"]
        values = [f"{line['a']:.3f}", f"{line['b']:.3f}", f"{line['difference']:+.3f}"]
        interval, above = "unknown", "unknown"
        if line["interval"] is not None:
            interval = "{:+.3f} to {:+.3f}".format(*line["interval"])
            above = f"{line['above_zero']:.1%}"
        first = [name, f"{line['temperature']:g}", *(f"{count:,}" for count in counts)]
        rows.append([*first, *values, interval, above])
    counts = ["batch", "groups"] if is_speed else ["prompts"]
    strong = frozenset(number for number, line in enumerate(lines) if "overall" in line)
    header = ["benchmark", "T", *counts, *COLUMNS]
    return for_terminal(Table(title, header, rows, strong=strong, note=note))


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """Both values of every setting that differs, by its path; None: the run has no such setting."""
    flat = [
        dict(flattened({name: value for name, value in run.items() if name not in UNIMPORTANT}))
        for run in (a, b)
    ]
    names = dict.fromkeys(name for found in flat for name in found)
    both = {name: [found.get(name) for found in flat] for name in names}
    return {name: values for name, values in both.items() if values[0] != values[1]}
