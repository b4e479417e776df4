"""The evaluate stage: each benchmark decoded plainly and speculatively by the same target, counts kept per prompt."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from deepspec.artifact import Artifact
from deepspec.aside import put_rejects
from deepspec.config import RunConfig, SamplingConfig
from deepspec.data.benchmarks import benchmark_digests
from deepspec.data.chat import Chat, load_chat, target_folder
from deepspec.data.tables import read_table, write_table
from deepspec.data.turns import stream_seed
from deepspec.errors import ArtifactMismatch
from deepspec.eval.acceptance import summarise
from deepspec.eval.benchmarks import Fitting, RenderedPrompt, Unit, load_benchmarks, make_units, render, split_fitting
from deepspec.eval.speculate import Seconds, Trace, speculate
from deepspec.events import Report, silent
from deepspec.generate import Decode, generate
from deepspec.lineage import artifact_of
from deepspec.model.checkpoint import load_draft, read_spec
from deepspec.model.spec import DraftSpec
from deepspec.records import Counts, Record
from deepspec.stages import choose, missing_shards, require_sealed
from deepspec.store import pretty_json
from deepspec.target import DTYPES, Target, load_target, read_text_config
from deepspec.work import Work, work_through

log = logging.getLogger(__name__)

def run_evaluate(config: RunConfig, *, shards: Sequence[int] | None = None, report: Report = silent) -> Artifact:
    """Decode the missing units (all, or of those asked for), and write the summary when none is missing."""
    inputs = require_sealed(config, "evaluate") | benchmark_digests(config, "evaluate")
    draft_artifact = artifact_of(config, "train")
    manifest = draft_artifact.manifest()
    units = {unit.number: unit for unit in make_units(config, load_benchmarks(config))}
    artifact = artifact_of(config, "evaluate")
    artifact.create(config.model_dump(mode="json"))
    digest = manifest.digest if manifest else ""
    missing = missing_shards(artifact, dict.fromkeys(choose(shards, units, "evaluate"), digest))
    if missing:
        if config.resources.evaluate_threads:
            torch.set_num_threads(config.resources.evaluate_threads)
        models = load_models(config, draft_artifact)
        warm_up(models, units[missing[0]], config)
        made_from = Record(artifact="", shard=0, file="", num_bytes=0, checksum=digest, rows=0)

        def make(work: Work, local: Path) -> Counts:
            rows, skipped = evaluate_unit(models, units[work.shard], config)
            put_rejects(artifact, work.shard, skipped)
            write_table(pa.Table.from_pylist(rows, SCHEMA), local)
            return Counts(rows=len(rows), tokens=sum(row["num_tokens"] for row in rows), rejected=len(skipped))

        work_through(config, artifact, [Work(number, made_from) for number in missing], make, report)
    if not missing_shards(artifact, dict.fromkeys(units, digest)):
        artifact.store.write(artifact.path("summary.json"), pretty_json(summary(artifact)))
        artifact.seal(shards=units, files=["summary.json"], inputs=inputs)
    return artifact


def load_models(config: RunConfig, draft_artifact: Artifact) -> Models:
    """Target and draft in the same dtype on the same device.

    Raises:
        ArtifactMismatch: the draft was made for a target of another shape; found before any weight is read.
    """
    chat, dtype = load_chat(config), config.evaluate.dtype or config.target.dtype
    folder, of_target = draft_artifact.fetch_folder("draft"), target_folder(config)
    check_pair(read_spec(folder), read_text_config(config.target, folder=of_target), layer_ids=config.target.layer_ids)
    target = load_target(config.target, folder=of_target, device=config.resources.device, dtype=dtype)
    draft = load_draft(folder, device=target.device, dtype=DTYPES[dtype])
    return Models(target, draft.eval(), chat, chat.stop_ids(target.generation_eos))


def check_pair(spec: DraftSpec, target: Any, *, layer_ids: Sequence[int]) -> None:
    """Refuse a draft of another target than the one whose text config is given and whose `layer_ids` are captured."""
    facts = {
        "vocabulary size": (spec.vocab_size, target.vocab_size),
        "hidden size": (spec.hidden_size, target.hidden_size),
        "layers": (spec.num_target_layers, target.num_hidden_layers),
        "captured layers": (tuple(spec.target_layer_ids), tuple(layer_ids)),
    }
    wrong = [f"{name}: draft {of_draft}, target {of_target}" for name, (of_draft, of_target) in facts.items() if of_draft != of_target]
    if wrong:
        fix = "evaluate it with the target it was trained for"
        raise ArtifactMismatch(f"the draft was trained for another target ({'; '.join(wrong)})", where="draft/config.json", fix=fix)


def read_rows(artifact: Artifact) -> list[dict[str, Any]]:
    return [row for record in artifact.records().values() for row in read_table(artifact.fetch_shard(record)).to_pylist()]


def summary(artifact: Artifact) -> dict[str, Any]:
    """All metrics per benchmark and temperature, and the macro means at the first temperature as the headline."""
    rows = read_rows(artifact)
    pairs = list(dict.fromkeys((row["benchmark"], row["temperature"]) for row in rows))
    parts: list[dict[str, Any]] = [
        {"benchmark": name, "temperature": temperature, **summarise(_select(rows, temperature, name))} for name, temperature in pairs
    ]
    temperatures = list(dict.fromkeys(part["temperature"] for part in parts))
    overall = {str(temperature): _overall(rows, parts, temperature) for temperature in temperatures}
    return {**overall[str(temperatures[0])], "temperature": temperatures[0], "temperatures": overall, "benchmarks": parts}


def _overall(rows: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]], temperature: float) -> dict[str, Any]:
    of_this = [part for part in parts if part["temperature"] == temperature]
    lengths = {str(part["benchmark"]): part["acceptance_length"] for part in of_this}
    macro = sum(lengths.values()) / len(lengths)
    return {**summarise(_select(rows, temperature)), "acceptance_length": {"macro": macro, **lengths}}


def _select(rows: Sequence[Mapping[str, Any]], temperature: float, benchmark: str | None = None) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["temperature"] == temperature and benchmark in (None, row["benchmark"])]
