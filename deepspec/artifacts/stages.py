"""The table of stages: for each, what it reads and what of a run decides what it makes.

Whatever depends on a stage is a field of its record here. How a stage is run from a run file is in
`run.py`; what is missing of it, in `missing.py`.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from deepspec.artifacts.digests import draft_digest, file_digest, folder_digest
from deepspec.config.benchmarks import DEMO, BenchmarkSet, find_benchmark
from deepspec.config.data import FileSource
from deepspec.config.recipes import section_of
from deepspec.config.retries import StageName
from deepspec.config.run import RunConfig
from deepspec.config.target import TargetConfig

BENCHMARKS = "benchmarks"  # the folder of known benchmarks, which are artifacts but no stage
BENCHMARKS_FORMAT = 1


class Stage(NamedTuple):
    """One stage of a run. Functions take the run's configuration, and only those of its fields
    that the stage depends on enter its fingerprint.
    """

    name: StageName
    format: int
    """Version of what it writes; a part of the fingerprint."""
    recipe: Callable[[RunConfig], dict[str, Any]]
    """Everything of the run itself that decides the content."""
    folder: Callable[[RunConfig], str]
    """A readable name for the folder, the same for all runs that share the artifact."""
    before: StageName | None = None
    """The stage whose artifact it is made from."""
    reads_demo: Callable[[RunConfig], bool] = lambda config: False
    """Whether it also reads the demo's target or texts."""
    flow: str = ""
    """The Prefect flow that makes this stage alone; empty for those that only `prepare` makes."""
    benchmarks: Callable[[RunConfig], Iterable[str]] = lambda config: ()
    """Names of the benchmarks that it reads, known ones and files alike."""
    is_sharded: bool = False
    """Whether its shards are those of the stage before, by number."""
    has_units: bool = False
    """Whether it is made of numbered units of its own, which `--shards` selects, too."""

    @property
    def is_selectable(self) -> bool:
        """Whether a run can ask for some of its shards or units."""
        return self.is_sharded or self.has_units

    def reads(self, config: RunConfig) -> tuple[StageName, ...]:
        """The stages whose artifacts it is made from, the one before it first."""
        before = () if self.before is None else (self.before,)
        return (*before, "demo") if self.reads_demo(config) else before

    def known_benchmarks(self, config: RunConfig) -> list[BenchmarkSet]:
        """Those of its benchmarks that have an artifact of their own."""
        names = dict.fromkeys(self.benchmarks(config))
        return [known for name in names if (known := find_benchmark(name))]


def _is_demo(config: RunConfig) -> bool:
    return config.demo is not None


def _benchmarks_to_evaluate(config: RunConfig) -> list[str]:
    return [entry.name for entry in config.evaluate.benchmarks]


def _recipe_of_prompts(config: RunConfig) -> dict[str, Any]:
    prompts = config.prompts
    sources = prompts.source.paths if isinstance(prompts.source, FileSource) else ()
    files = [*sources, *filter(_is_file, prompts.decontaminate)]
    return {"prompts": section_of(prompts), "files": {path: file_digest(path) for path in files}}


def _recipe_of_hidden(config: RunConfig) -> dict[str, Any]:
    layers = section_of(config.target)["layer_ids"]
    target = {**_answering_target(config.target), "layer_ids": layers}
    return {"hidden": section_of(config.hidden), "target": target}


def _recipe_of_train(config: RunConfig) -> dict[str, Any]:
    settings = section_of(config.train)
    del settings["strategy"]  # how ranks share the work: a training may resume with another one
    start = settings.pop("start_from")
    if start is not None:
        settings["start_from"] = draft_digest(start)
    draft = section_of(config.draft)
    if draft.get("layout") == "anchor_predicts":
        del draft["layout"]  # what drafts had before there was a choice
    return {
        "mask_token_id": config.target.mask_token_id,
        "draft": draft,
        "loss": section_of(config.loss),
        "train": settings,
    }


def _recipe_of_evaluate(config: RunConfig) -> dict[str, Any]:
    known = STAGES["evaluate"].known_benchmarks(config)
    settings = section_of(config.evaluate)
    settings["draft_sampling"] = config.evaluate.sampling_of_draft
    unused = (
        ("batch_sizes", "threshold")
        if config.evaluate.is_served
        else ("engine", "concurrencies", "draft_sampling")
    )
    return {
        "evaluate": {key: value for key, value in settings.items() if key not in unused},
        "target": _answering_target(config.target),
        "files": {
            path: file_digest(path) for path in filter(_is_file, _benchmarks_to_evaluate(config))
        },
        "known": {entry.name: [entry.num_prompts, entry.domain] for entry in known},
    }


def _answering_target(target: TargetConfig) -> dict[str, Any]:
    """What decides how the target answers: its weights, its template, its number format."""
    section = section_of(target)
    fields = {
        key: section[key] for key in ("model", "revision", "chat_family", "thinking", "dtype")
    }
    folder = Path(target.model)
    # A hub model is named by its revision, the demo's by its artifact.
    if target.model != "demo" and folder.is_dir():
        fields["files"] = folder_digest(str(folder.resolve()))
    return fields


def _is_file(benchmark: str) -> bool:
    return benchmark not in DEMO and find_benchmark(benchmark) is None


def _prompts_folder(config: RunConfig) -> str:
    source = config.prompts.source
    if source.kind == "demo":
        return "demo"
    return _slug(Path(source.paths[0]).stem if source.kind == "files" else source.name)


def _target_folder(config: RunConfig) -> str:
    return _slug(config.target.model)


def _draft_folder(config: RunConfig) -> str:
    return f"{config.draft.algorithm}-{_slug(config.target.model)}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", Path(text).name.lower()).strip("-.") or "x"


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="demo",
            format=1,
            recipe=lambda config: {"demo": section_of(config.demo) if config.demo else None},
            folder=lambda config: "demo",
        ),
        Stage(
            name="prompts",
            format=2,
            recipe=_recipe_of_prompts,
            folder=_prompts_folder,
            reads_demo=lambda config: config.prompts.source.kind == "demo",
            benchmarks=lambda config: config.prompts.decontaminate,
        ),
        Stage(
            name="answers",
            format=2,
            recipe=lambda config: {
                "answers": section_of(config.answers),
                "target": _answering_target(config.target),
            },
            folder=_target_folder,
            before="prompts",
            reads_demo=_is_demo,
            flow="regenerate",
            is_sharded=True,
        ),
        Stage(
            name="hidden",
            format=1,
            recipe=_recipe_of_hidden,
            folder=_target_folder,
            before="answers",
            reads_demo=_is_demo,
            flow="capture",
            is_sharded=True,
        ),
        Stage(
            name="train",
            format=1,
            recipe=_recipe_of_train,
            folder=_draft_folder,
            before="hidden",
            flow="train",
        ),
        Stage(
            name="evaluate",
            format=1,
            recipe=_recipe_of_evaluate,
            folder=_draft_folder,
            before="train",
            reads_demo=_is_demo,
            flow="evaluate",
            benchmarks=_benchmarks_to_evaluate,
            has_units=True,
        ),
    )
}
