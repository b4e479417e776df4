"""The hidden stage: answers run through the target once, its hidden states written as Arrow shards.

Rows are written in the order they are computed (by length, so that a batch wastes little), a row's shard and place
being in the index. What is written was checked: finite, no zero rows, and the target's own predictions come back out of
the stored states.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor

from deepspec.artifact import Artifact
from deepspec.config import HiddenConfig, RunConfig
from deepspec.data.answers import conversation_so_far, stream_seed
from deepspec.data.cache import HiddenSample, Layout, ShardWriter, last_hidden_spans, write_index
from deepspec.data.chat import Chat, build_samples, load_chat, parse_messages, target_folder
from deepspec.data.tables import read_table
from deepspec.errors import DamagedData
from deepspec.events import Report, silent
from deepspec.generate import pad_right
from deepspec.records import Counts
from deepspec.stages import Work, open_sharded, seal_if_whole, stage_status, work_through
from deepspec.store import pretty_json
from deepspec.target import Target, TargetOutput, load_target

log = logging.getLogger(__name__)

SCHEMA, TENSORS, CONFIG = "schema.arrow", "frozen.safetensors", "target/config.json"
FROZEN = (SCHEMA, TENSORS, CONFIG)  # what is written once beside the shards
FILES = (*FROZEN, "index.arrow")
MIN_ARGMAX_AGREEMENT = 0.98  # of the target's own predictions, read back through bfloat16


class CaptureRow(NamedTuple):
    sample_id: int
    held_out: bool
    input_ids: list[int]
    loss_mask: list[bool]


def run_capture(config: RunConfig, *, shards: Sequence[int] | None = None, report: Report = silent) -> Artifact:
    """Capture the missing shards (all, or of those asked for), and seal when none is missing."""
    stage = open_sharded(config, "hidden", shards)
    if stage.todo or _lacks_frozen(stage.artifact):
        chat = load_chat(config)
        target = load_target(config.target, folder=target_folder(config), device=config.resources.device)
        layout = _layout(config, target)
        if _lacks_frozen(stage.artifact):
            _write_frozen(stage.artifact, target, layout)

        def make(work: Work, local: Path) -> Counts:
            rows = capture_rows(read_table(stage.upstream.fetch_shard(work.upstream)).to_pylist(), chat, config.hidden)
            return _capture_shard(rows, target, local, work.shard, layout, config)

        work_through(config, stage.artifact, stage.todo, make, report)
    if not stage_status(config, "hidden").missing:
        write_index(stage.artifact, stage.artifact.records().values())
        seal_if_whole(config, "hidden", files=FILES)
    return stage.artifact


def capture_rows(answers: Sequence[dict[str, Any]], chat: Chat, settings: HiddenConfig) -> list[CaptureRow]:
    """The training sequences of a shard of answers, cut behind the last supervised token and at `max_length`.

    A sequence without two supervised tokens in a row teaches nothing and is left out.
    """
    rows = []
    for answer in answers:
        messages, texts = parse_messages(answer["messages"]), [turn["text"] for turn in answer["turns"]]
        turns = []
        for number, turn in enumerate(answer["turns"]):
            conversation = conversation_so_far(messages, texts[:number])
            ids = turn["token_ids"] or chat.answer_ids(turn["text"], finished=turn["finish_reason"] == "stop")
            turns.append((chat.render(conversation or []), list(ids)))
        for number, sample in enumerate(build_samples(turns)):
            input_ids, mask = sample.input_ids[: settings.max_length], sample.loss_mask[: settings.max_length]
            if any(first and second for first, second in pairwise(mask)):
                sample_id = stream_seed(0, answer["id"], number) if number else answer["id"]
                rows.append(CaptureRow(sample_id, answer["held_out"], input_ids, mask))
    return sorted(rows, key=lambda row: (len(row.input_ids), row.sample_id))


def _capture_shard(rows: Sequence[CaptureRow], target: Target, local: Path, shard: int, layout: Layout, config: RunConfig) -> Counts:
    supervised = 0
    with pa.OSFile(str(local), "wb") as sink:
        writer = ShardWriter(sink, layout, shard)
        for batch in token_batches(rows, config.resources.batch_tokens):
            output = target.forward(pad_right([row.input_ids for row in batch], target.device))
            for index, row in enumerate(batch):
                sample = _sample(row, output, index, keep_last=config.hidden.last_hidden == "supervised")
                supervised += int(sample.loss_mask.sum())
                writer.append(sample, held_out=row.held_out)
            _check_states(target, batch[0], output)
        index_rows = writer.close()
    tokens = sum(len(row.input_ids) for row in rows)
    return Counts(rows=len(rows), tokens=tokens, extra={"supervised": supervised}, index_rows=index_rows)


def token_batches(rows: Sequence[CaptureRow], batch_tokens: int) -> Iterator[list[CaptureRow]]:
    """Consecutive rows, as many as fit into `batch_tokens` once padded to the longest (the last) of them."""
    batch: list[CaptureRow] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(row.input_ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _sample(row: CaptureRow, output: TargetOutput, index: int, *, keep_last: bool) -> HiddenSample:
    length = len(row.input_ids)
    spans = last_hidden_spans(row.loss_mask) if keep_last else np.zeros((0, 2), np.int32)
    kept = np.concatenate([np.arange(start, start + count) for start, count in spans]) if len(spans) else np.zeros(0, np.int64)
    last = output.last_hidden[index].index_select(0, torch.from_numpy(kept).to(output.last_hidden.device))
    return HiddenSample(
        sample_id=row.sample_id,
        input_ids=torch.tensor(row.input_ids, dtype=torch.int32),
        loss_mask=torch.tensor(row.loss_mask, dtype=torch.uint8),
        context=output.context[index, :length].to(torch.bfloat16).cpu(),
        last_hidden=last.to(torch.bfloat16).cpu(),
        last_spans=torch.from_numpy(spans),
    )


def _check_states(target: Target, row: CaptureRow, output: TargetOutput) -> None:
    """Refuse to commit states that are not finite, have empty rows, or do not predict what the target predicts.

    Raises:
        DamagedData: naming the sample.
    """
    length = len(row.input_ids)
    context, last = output.context[0, :length].to(torch.bfloat16), output.last_hidden[0, :length]
    where = f"sample {row.sample_id:016x}"
    if not bool(torch.isfinite(context).all() and torch.isfinite(last).all()):
        raise DamagedData("the target's hidden states are not finite", where=where, fix="check the model's weights and target.dtype")
    if bool((context == 0).all(dim=-1).any()):
        raise DamagedData("a token has no hidden state (all zeros)", where=where, fix="check the model's weights")
    stored = target.logits(last.to(torch.bfloat16).to(last.dtype)).argmax(dim=-1)
    agreement = float((stored == target.logits(last).argmax(dim=-1)).float().mean())
    if length >= 64 and agreement < MIN_ARGMAX_AGREEMENT:  # on a short row one token is already more than the limit allows
        what = f"only {agreement:.1%} of the target's predictions come back out of the stored states"
        raise DamagedData(what, where=where, fix="the final norm is missing or applied twice; report this with the model's name")


def _layout(config: RunConfig, target: Target) -> Layout:
    hidden_size = int(target.text_config.hidden_size)
    metadata = {
        "target": config.target.model, "revision": str(config.target.revision), "layers": str(list(config.target.layer_ids)),
        "codec": config.hidden.codec, "last_hidden": "post_final_norm",
    }  # fmt: skip
    return Layout(context_width=hidden_size * len(config.target.layer_ids), hidden_size=hidden_size, metadata=metadata)


def _lacks_frozen(artifact: Artifact) -> bool:
    return not all(artifact.store.exists(artifact.path(name)) for name in FROZEN)


def _write_frozen(artifact: Artifact, target: Target, layout: Layout) -> None:
    """The schema, the target's config, and its embedding and lm_head: all that training needs to know of the target."""
    artifact.store.write(artifact.path(SCHEMA), layout.schema().serialize().to_pybytes())
    # Where the target lay and which library read it decide nothing, and would make equal caches look different.
    config = {key: value for key, value in target.text_config.to_dict().items() if key not in ("_name_or_path", "transformers_version")}
    artifact.store.write(artifact.path(CONFIG), pretty_json(config))
    with artifact.store.staged() as local:
        save_file(frozen_tensors(target), local)
        artifact.store.publish(local, artifact.path(TENSORS))


def frozen_tensors(target: Target) -> dict[str, Tensor]:
    """The target's embedding and lm_head [V, D], which every draft shares and keeps as they are."""
    embedding = target.model.get_input_embeddings().weight
    return {"embed_tokens.weight": embedding.detach().cpu().clone(), "lm_head.weight": target.lm_head.weight.detach().cpu().clone()}
