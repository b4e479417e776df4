"""The evaluate stage: each benchmark decoded plainly and speculatively by the same target,
counts kept per prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.missing import choose, missing_units, require_sealed
from deepspec.artifacts.records import Counts, Record
from deepspec.artifacts.results import EvaluationSummary
from deepspec.artifacts.run import Run
from deepspec.artifacts.shard_loop import Work, work_through
from deepspec.artifacts.side_files import put_rejects
from deepspec.artifacts.tables import write_table
from deepspec.errors import ArtifactMismatch
from deepspec.evaluate.calibration import fit_calibration
from deepspec.evaluate.confidence import summarise_confidence
from deepspec.evaluate.policies import live_policy, put_calibration
from deepspec.evaluate.prompts import Unit, load_benchmarks, make_units
from deepspec.evaluate.results import compute_summary, read_rows
from deepspec.evaluate.speed_curve import SpeedCurve, profile, read_curve
from deepspec.evaluate.units import SCHEMA, Evaluator, Models
from deepspec.model.checkpoint import load_draft, read_spec
from deepspec.model.spec import DraftSpec
from deepspec.process.events import Report, silent
from deepspec.prompts.benchmarks import benchmark_digests
from deepspec.storage.store import pretty_json
from deepspec.target.chat import load_chat, target_folder
from deepspec.target.loading import DTYPES, load_target, read_text_config

log = logging.getLogger(__name__)


def run_evaluate(
    run: Run, *, shards: Sequence[int] | None = None, report: Report = silent
) -> Artifact:
    """Decode the missing units (all, or those of `shards`), and write the summary when none is
    missing.

    Raises:
        DataError: not one prompt fits into the target, or `resources.devices.speed_curve` is no curve.
    """
    inputs = require_sealed(run, "evaluate") | benchmark_digests(run, "evaluate")
    units = {unit.number: unit for unit in make_units(run.config, load_benchmarks(run))}
    stage = _Evaluation(run, units)
    artifact = run.create("evaluate")
    missing = missing_units(run, "evaluate", choose(shards, units, "evaluate"))
    if missing:
        stage.begin()
        made_from = Record(
            artifact="", shard=0, file="", num_bytes=0, checksum=stage.digest, rows=0
        )
        todo = [Work(number, made_from) for number in missing]
        # Seconds are part of a row, so that no two workers make the same unit twice.
        work_through(run, artifact, todo, stage.unit, report, repeatable=False)
    if artifact.manifest() is None and not missing_units(run, "evaluate", units):
        content = pretty_json(stage.summary().to_json())
        artifact.store.write(artifact.path("summary.json"), content)
        artifact.seal(shards=units, files=["summary.json"], inputs=inputs)
    return artifact


class _Evaluation:
    """One run: target and draft are loaded when something is to be decoded or profiled."""

    def __init__(self, run: Run, units: dict[int, Unit]) -> None:
        self.run = run
        self.config = run.config
        self.units = units
        self.artifact = run.artifact("evaluate")
        self.draft = run.artifact("train")
        manifest = self.draft.manifest()
        self.digest = manifest.digest if manifest else ""
        path = run.config.resources.devices.speed_curve
        # Used at the end at the earliest, and checked before the first prompt.
        self.given_curve = read_curve(Path(path)) if path else None

    @cached_property
    def models(self) -> Models:
        return load_models(self.run, self.draft)

    def curve(self) -> SpeedCurve:
        """`resources.devices.speed_curve`, or what this machine does with the target."""
        return self.given_curve or profile(
            self.models.target, block_size=self.models.draft.block_size
        )

    def begin(self) -> None:
        """Get ready to decode."""
        settings = self.config.evaluate
        if self.config.resources.devices.evaluate_threads:
            torch.set_num_threads(self.config.resources.devices.evaluate_threads)
        models = self.models
        policy = live_policy(settings, self.artifact, self.draft, self.curve)
        self.evaluator = Evaluator(models, settings, policy)

    def unit(self, work: Work, local: Path) -> Counts:
        """Decode one unit into a staged file."""
        rows, skipped = self.evaluator.evaluate(self.units[work.shard])
        put_rejects(self.artifact, work.shard, skipped)
        write_table(pa.Table.from_pylist(rows, SCHEMA), local)
        tokens = sum(row["num_tokens"] for row in rows)
        return Counts(rows=len(rows), tokens=tokens, rejected=len(skipped))

    def summary(self) -> EvaluationSummary:
        """The summary of all rows, with a calibration where confidences were recorded.

        Only of blocks that were verified whole: of those that were cut, the target's verdict on the
        rest is not known.
        """
        rows = read_rows(self.artifact)
        found = compute_summary(self.artifact, rows)
        if self.config.evaluate.verify != "full" or not any(row["confidence"] for row in rows):
            return found
        block_size = self.models.draft.block_size
        calibration = fit_calibration(rows, block_size)
        if calibration is None:
            return found
        put_calibration(calibration, self.artifact, self.draft)
        parts = summarise_confidence(calibration, rows, block_size, self.curve())
        return found.model_copy(update=parts._asdict())


def load_models(run: Run, draft_artifact: Artifact) -> Models:
    """Target and draft in the same dtype on the same device.

    Raises:
        ArtifactMismatch: the draft was made for a target of another shape; found before any weight
            is read.
    """
    config = run.config
    chat, dtype = load_chat(run), config.evaluate.dtype or config.target.dtype
    folder, of_target = draft_artifact.fetch_folder("draft"), target_folder(run)
    check_pair(
        read_spec(folder),
        read_text_config(config.target, folder=of_target),
        layer_ids=config.target.layer_ids,
    )
    target = load_target(
        config.target, folder=of_target, device=config.resources.devices.type, dtype=dtype
    )
    draft = load_draft(folder, device=target.device, dtype=DTYPES[dtype])
    return Models(target, draft.eval(), chat, chat.stop_ids(target.generation_eos))


def check_pair(spec: DraftSpec, target: Any, *, layer_ids: Sequence[int]) -> None:
    """Refuse a draft of another target than the one whose text config is given and whose
    `layer_ids` are captured.
    """
    facts = {
        "vocabulary size": (spec.vocab_size, target.vocab_size),
        "hidden size": (spec.hidden_size, target.hidden_size),
        "layers": (spec.num_target_layers, target.num_hidden_layers),
        "captured layers": (tuple(spec.target_layer_ids), tuple(layer_ids)),
    }
    wrong = [
        f"{name}: draft {of_draft}, target {of_target}"
        for name, (of_draft, of_target) in facts.items()
        if of_draft != of_target
    ]
    if wrong:
        fix = "evaluate it with the target it was trained for"
        raise ArtifactMismatch(
            f"the draft was trained for another target ({'; '.join(wrong)})",
            where="draft/config.json",
            fix=fix,
        )
