"""The benchmarks that are known by name, a record each in `benchmarks.yaml`: the data set, the
wording around each of its rows, how many prompts.

Nothing here reads a data set: that is `prompts/benchmarks.py`.
"""

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import PurePath
from string import Formatter
from typing import Any, Literal

import yaml

from deepspec.config.section import Section, nearest
from deepspec.errors import DataError

Domain = Literal["math", "code", "chat", "other"]
DEMO = ("demo/math", "demo/code", "demo/chat")
FILES = (".jsonl", ".json", ".parquet")


class BenchmarkSet(Section):
    """A known benchmark: a data set on the hub, and what a prompt is made of."""

    name: str
    """Name by which runs refer to it."""
    dataset: str
    """Name of the data set on the hub."""
    subset: str | None = None
    """Configuration of the data set."""
    split: str = "test"
    """Split to read."""
    files: tuple[str, ...] = ()
    """Files to read one by one, in place of subset and split."""
    revision: str | None = None
    """Commit or tag; null reads the newest commit, logs which one, and stays with it."""
    domain: Domain
    """What the prompts are about."""
    num_prompts: int | None
    """Prompts that the protocol of the published drafts takes; null is all."""
    problem: str | None = None
    """Column whose text, in a training set, would be the benchmark's problem."""
    wordings: tuple[str, ...]
    """Prompts with columns in braces; of a row the first one counts of whose columns none is
    empty."""


_TABLE = files("deepspec.config").joinpath("benchmarks.yaml").read_text(encoding="utf-8")
KNOWN = {name: BenchmarkSet(name=name, **fields) for name, fields in yaml.safe_load(_TABLE).items()}


def find_benchmark(name: str) -> BenchmarkSet | None:
    """The known benchmark of `name` or `name@revision`; None for a demo's benchmark or a file."""
    bare, _, revision = name.partition("@")
    known = KNOWN.get(bare)
    return known.model_copy(update={"revision": revision}) if known and revision else known


def short_name(name: str) -> str:
    """A benchmark's name in results: its known name, or its file's."""
    known = find_benchmark(name)
    return known.name if known else PurePath(name).stem


def check_name(name: str, *, others: Iterable[str] = ()) -> str:
    """The name, if it is known (or one of `others`) or can be a file's.

    Raises:
        ValueError: it is neither; the nearest known names are named.
    """
    known = [*KNOWN, *others]
    is_path = "/" in name or PurePath(name).suffix in FILES
    if find_benchmark(name) or name in known or (is_path and not name.startswith("demo/")):
        return name
    raise ValueError(
        f"there is no benchmark {name!r}{nearest(name.partition('@')[0], known, most=3)}; known "
        f"are {', '.join(known)}, or give a file ({', '.join(FILES)})"
    )


def turns_of(benchmark: BenchmarkSet, row: Mapping[str, Any]) -> list[str]:
    """The user's messages of a row of the data set, in the first wording whose columns it fills.

    Raises:
        DataError: it fills none; the columns that it has are named.
    """
    for wording in benchmark.wordings:
        values = {column: row.get(column) for column in columns_of(wording)}
        if all(values.values()):
            (column, value), *more = values.items()
            if isinstance(value, list) and not more:
                return [wording.format_map({column: turn}) for turn in value]
            return [wording.format_map(values)]
    missing = " or ".join(columns_of(benchmark.wordings[-1]))
    raise DataError(
        f"a row has nothing in {missing}, its columns are {', '.join(sorted(row)) or 'none'}",
        where=f"benchmark {benchmark.name}, data set {benchmark.dataset}",
        fix=f"name a revision that has it ({benchmark.name}@COMMIT), or give the prompts as a "
        "JSONL file",
    )


def columns_of(wording: str) -> list[str]:
    """The data set's columns that a wording names, in its order."""
    return [column for _, column, _, _ in Formatter().parse(wording) if column]
