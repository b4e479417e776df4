"""The evaluate stage: each benchmark decoded plainly and speculatively by the same target, counts kept per prompt."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from deepspec.artifact import Artifact
from deepspec.config import RunConfig, SamplingConfig
from deepspec.data.chat import Chat, load_chat, target_folder
from deepspec.data.tables import write_table
from deepspec.data.turns import stream_seed
from deepspec.errors import ArtifactMismatch
from deepspec.eval.benchmarks import RenderedPrompt, Unit, load_benchmarks, make_units, render
from deepspec.eval.results import read_rows as read_rows
from deepspec.eval.results import summary
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

COUNTS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("benchmark", pa.string()), ("temperature", pa.float64()), ("prompt", pa.int32()), ("prompt_digest", pa.string()),
        ("num_prompt_tokens", pa.int32()), ("num_tokens", pa.int32()), ("plain_tokens", pa.int32()), ("identical", pa.bool_()),
        ("proposed", COUNTS), ("accepted", COUNTS), ("committed", COUNTS), ("token_ids", COUNTS),
        ("seconds", pa.float64()), ("draft_seconds", pa.float64()), ("verify_seconds", pa.float64()), ("plain_seconds", pa.float64()),
    ]
)  # fmt: skip


class Models(NamedTuple):
    target: Target
    draft: Any
    chat: Chat
    stop_ids: frozenset[int]


def run_evaluate(config: RunConfig, *, shards: Sequence[int] | None = None, report: Report = silent) -> Artifact:
    """Decode the missing units (all, or of those asked for), and write the summary when none is missing."""
    inputs = require_sealed(config, "evaluate")
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
            rows = evaluate_unit(models, units[work.shard], config)
            write_table(pa.Table.from_pylist(rows, SCHEMA), local)
            return Counts(rows=len(rows), tokens=sum(row["num_tokens"] for row in rows))

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


def warm_up(models: Models, unit: Unit, config: RunConfig) -> None:
    """Decode one prompt both ways so that no first-call cost lands in a measurement."""
    prompt = render(models.chat, unit.prompts[0])
    _both_ways(models, prompt, config, temperature=unit.temperature, seed=0, plain_first=True)


def evaluate_unit(models: Models, unit: Unit, config: RunConfig) -> list[dict[str, Any]]:
    """One row per prompt; the two ways of decoding alternate, and take turns at going first."""
    rows = []
    for number, text in enumerate(unit.prompts, start=unit.first):
        prompt = render(models.chat, text)
        seed = stream_seed(config.evaluate.seed, int(prompt.digest, 16), number)
        plain, plain_seconds, trace, seconds = _both_ways(
            models, prompt, config, temperature=unit.temperature, seed=seed, plain_first=number % 2 == 0
        )
        rows.append(
            {
                "benchmark": unit.benchmark, "temperature": unit.temperature, "prompt": number, "prompt_digest": prompt.digest,
                "num_prompt_tokens": len(prompt.input_ids), "num_tokens": len(trace.token_ids), "plain_tokens": len(plain),
                "identical": plain == trace.token_ids, **trace._asdict(),
                "seconds": seconds.total, "draft_seconds": seconds.draft, "verify_seconds": seconds.verify, "plain_seconds": plain_seconds,
            }
        )  # fmt: skip
    return rows


def _both_ways(
    models: Models, prompt: RenderedPrompt, config: RunConfig, *, temperature: float, seed: int, plain_first: bool
) -> tuple[list[int], float, Trace, Seconds]:
    settings = Decode(SamplingConfig(temperature=temperature), config.evaluate.max_new_tokens, models.stop_ids)

    def plainly() -> tuple[list[int], float]:
        started = time.perf_counter()
        tokens = generate(models.target, [prompt.input_ids], settings, seeds=[seed])[0]
        return tokens, time.perf_counter() - started

    plain = plainly() if plain_first else None
    traces, seconds = speculate(models.target, models.draft, [prompt.input_ids], settings, seeds=[seed])
    plain = plain or plainly()
    return *plain, traces[0], seconds
