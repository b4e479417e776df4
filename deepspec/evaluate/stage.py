"""The evaluate stage: each benchmark decoded plainly and speculatively by the same target."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import torch

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.missing import chosen_shards, missing_units, require_sealed
from deepspec.artifacts.records import Counts
from deepspec.artifacts.results import EvaluationSummary
from deepspec.artifacts.run import Run
from deepspec.artifacts.shard_loop import Make, work_through
from deepspec.artifacts.side_files import put_rejects
from deepspec.artifacts.tables import write_table
from deepspec.errors import ArtifactMismatch, OutOfMemory
from deepspec.evaluate.calibration import fit_calibration
from deepspec.evaluate.confidence import summarise_confidence
from deepspec.evaluate.policies import live_policy, put_calibration
from deepspec.evaluate.prompts import Unit, load_benchmarks, make_units
from deepspec.evaluate.results import SCHEMA, compute_summary, read_rows
from deepspec.evaluate.served_stage import served_units
from deepspec.evaluate.server_check import ENGINE
from deepspec.evaluate.speed_curve import SpeedCurve, profile, read_curve
from deepspec.evaluate.units import Evaluator, Models
from deepspec.model.checkpoint import load_draft, read_spec
from deepspec.model.memory import naming_oom
from deepspec.process.events import Report, silent
from deepspec.prompts.benchmarks import benchmark_digests
from deepspec.storage.store import pretty_json
from deepspec.target.chat import load_chat, target_folder
from deepspec.target.gpu_room import require_room
from deepspec.target.loading import DTYPES, load_target, read_text_config


class UnitWork(NamedTuple):
    """A unit to decode, which is one shard of the result."""

    shard: int
    unit: Unit
    made_from: str
    """The digest of the draft."""


def run_evaluate(
    run: Run, *, shards: Sequence[int] | None = None, report: Report = silent
) -> Artifact:
    """Decode the missing units (all, or those of `shards`); write the summary if none is missing.

    Raises:
        DataError: not one prompt fits into the target, or `devices.speed_curve` is no curve.
    """
    inputs = require_sealed(run, "evaluate") | benchmark_digests(run, "evaluate")
    units = {unit.number: unit for unit in make_units(run.config, load_benchmarks(run))}
    evaluation = _Evaluation(run)
    artifact = run.create("evaluate")
    missing = missing_units(run, "evaluate", chosen_shards(shards, units, "evaluate"))
    if missing:
        made_from = inputs[f"train/{evaluation.draft.key.fingerprint}"]
        todo = [UnitWork(number, units[number], made_from) for number in missing]
        # Seconds are part of a row, so that no two workers make the same unit twice.
        with evaluation.unit_maker([work.unit for work in todo]) as make:
            work_through(run, artifact, todo, make, report, repeatable=False)
    if artifact.manifest() is None and not missing_units(run, "evaluate", units):
        content = pretty_json(evaluation.summary().to_json())
        artifact.write("summary.json", content)
        files = ["summary.json", *([ENGINE] if run.config.evaluate.is_served else ())]
        artifact.seal(shards=units, files=files, inputs=inputs)
    return artifact


class _Evaluation:
    """One run: target and draft are loaded when something is to be decoded or profiled."""

    def __init__(self, run: Run) -> None:
        self.run, self.settings = run, run.config.evaluate
        self.artifact, self.draft = run.artifact("evaluate"), run.artifact("train")
        path = run.config.resources.devices.speed_curve
        # Used at the end at the earliest, and checked before the first prompt.
        self.given_curve = read_curve(Path(path)) if path else None

    @cached_property
    def models(self) -> Models:
        return load_models(self.run)

    def curve(self) -> SpeedCurve:
        """`devices.speed_curve`, or what this machine does with the target."""
        target, draft, *_ = self.models
        return self.given_curve or profile(target, block_size=draft.block_size)

    @contextmanager
    def unit_maker(self, units: Sequence[Unit]) -> Iterator[Make[UnitWork]]:
        """What decodes one of these units into a staged file, with servers or in this process."""
        if not self.settings.is_served:
            yield self._loaded()
            return
        require_same_target(self.run)
        with served_units(self.run, units) as make_unit:
            yield lambda work, local: make_unit(work.unit, local)

    def _loaded(self) -> Make[UnitWork]:
        if num_threads := self.run.config.resources.devices.evaluate_threads:
            torch.set_num_threads(num_threads)
        policy = live_policy(self.settings, self.artifact, self.draft, self.curve)
        evaluator = Evaluator(self.models, self.settings, policy)

        def make(work: UnitWork, local: Path) -> Counts:
            rows, skipped = evaluator.evaluate(work.unit)
            put_rejects(self.artifact, work.shard, skipped)
            write_table(pa.Table.from_pylist(rows, SCHEMA), local)
            tokens = sum(row["num_tokens"] for row in rows)
            return Counts(rows=len(rows), tokens=tokens, rejected=len(skipped))

        return make

    def summary(self) -> EvaluationSummary:
        """The summary of all rows, with a calibration where confidences were recorded.

        Calibrated are only blocks that were verified whole: of those that were cut, the target's
        verdict on the rest is not known.
        """
        rows = read_rows(self.artifact)
        found = compute_summary(self.artifact, rows)
        if self.settings.verify != "full" or not any(row["confidence"] for row in rows):
            return found
        block_size = self.models.draft.block_size
        calibration = fit_calibration(rows, block_size)
        if calibration is None:
            return found
        put_calibration(calibration, self.artifact, self.draft)
        of_draft, of_policies = summarise_confidence(calibration, rows, block_size, self.curve())
        return found.model_copy(update={"calibration": of_draft, "scheduler": of_policies})


def load_models(run: Run) -> Models:
    """Target and draft in the same dtype on the same device.

    Embedding and lm_head are there once where the draft has those of the target.

    Raises:
        ArtifactMismatch: the draft is for a target of another shape; checked before any weight is
            read.
        ConfigError: they do not fit the GPU, which is known as early.
    """
    config = run.config
    chat, dtype = load_chat(run), config.evaluate.dtype or config.target.dtype
    folder, of_target = run.artifact("train").fetch_folder("draft"), target_folder(run)
    require_same_target(run)
    require_room(run, "evaluate")
    target = load_target(
        config.target,
        folder=of_target,
        device=config.resources.devices.type,
        num_gpus=config.resources.devices.gpus_per_lane,
        dtype=dtype,
    )
    if config.resources.devices.cuda_graphs == "off":
        target.shelf.turn_off_graphs()
    too_large = OutOfMemory(
        f"the draft does not fit into the memory of {target.device} next to its target",
        where="draft/model.safetensors",
        fix="spread the target over several GPUs (resources.devices.gpus_per_lane), or evaluate "
        "on one with more memory",
    )
    with naming_oom(too_large):
        draft = load_draft(folder, device=target.device, dtype=DTYPES[dtype], shared=target.frozen)
    return Models(target, draft, chat, chat.stop_ids(target.eos_ids))


def require_same_target(run: Run) -> None:
    """Refuse a draft for a target of another shape, before any weight is read.

    Raises:
        ArtifactMismatch: naming what differs.
    """
    spec = read_spec(run.artifact("train").fetch_folder("draft"))
    text = read_text_config(run.config.target, folder=target_folder(run))
    facts = {
        "vocabulary size": (spec.vocab_size, text.vocab_size),
        "hidden size": (spec.hidden_size, text.hidden_size),
        "layers": (spec.num_target_layers, text.num_hidden_layers),
        "captured layers": (tuple(spec.target_layer_ids), tuple(run.config.target.layer_ids)),
    }
    wrong = [f"{name}: draft {a}, target {b}" for name, (a, b) in facts.items() if a != b]
    if wrong:
        what = f"the draft was trained for another target ({'; '.join(wrong)})"
        fix = "evaluate it with the target it was trained for"
        raise ArtifactMismatch(what, where="draft/config.json", fix=fix)
