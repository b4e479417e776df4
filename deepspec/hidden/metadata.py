"""What a cache holds beside its shards, written once: schema, channel scales, and all that training
needs of the target.

The static channel scales come from samples of the first shards, whatever shards a lane was given,
so every lane arrives at the same; the first to write them wins and all others read those. Each
shard's record names the scales that it was encoded with. A lossy codec is measured on other
samples, and refused if it loses too much: before any shard is written.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from safetensors.torch import load, save, save_file
from torch import Tensor

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.records import Record
from deepspec.artifacts.tables import read_table
from deepspec.cache.codecs import channel_scale, make_codec
from deepspec.cache.fidelity import Fidelity, measure, refuse
from deepspec.cache.format import Layout
from deepspec.cache.reader import SCALES, SCHEMA
from deepspec.config.run import RunConfig
from deepspec.errors import DamagedData
from deepspec.hidden.sequences import CaptureRow, capture_rows
from deepspec.process.events import Report
from deepspec.storage.store import pretty_json
from deepspec.target.chat import Chat
from deepspec.target.model import Target, TargetOutput

log = logging.getLogger(__name__)

TENSORS, CONFIG, FIDELITY = "frozen.safetensors", "target/config.json", "fidelity.json"
SCALE_TOKENS, ROW_TOKENS = 2048, 128  # as many again, of other samples, measure the codec
LOSSY = ("int8", "fp8")


def metadata_files(config: RunConfig) -> tuple[str, ...]:
    """Names of what stands beside the shards and is sealed with them."""
    return (SCHEMA, TENSORS, CONFIG, *(name for name in codec_files(config) if name == SCALES))


def lacks_metadata(config: RunConfig, artifact: Artifact) -> bool:
    return not all(artifact.store.exists(artifact.path(name)) for name in metadata_files(config))


def write_metadata(
    config: RunConfig, stage: ShardedStage, chat: Chat, target: Target, report: Report
) -> Layout:
    """The layout of the cache; what stands beside the shards is there when this returns.

    Raises:
        FidelityTooLow: the codec loses more of this target's states than `resources.checks.fidelity`
            allows.
    """
    artifact, scales = stage.artifact, dict[str, Tensor]()
    missing = [
        name for name in codec_files(config) if not artifact.store.exists(artifact.path(name))
    ]
    first = first_states(config, stage, chat, target) if missing else None
    if first is not None and SCALES in missing:
        made = {
            "context": channel_scale(first.context[: first.half]),
            "last_hidden": channel_scale(first.last[: first.half]),
        }
        artifact.store.write_new(
            artifact.path(SCALES),
            save({name: scale.cpu().contiguous() for name, scale in made.items()}),
        )
    if codec_files(config):
        scales = load(artifact.store.read(artifact.path(SCALES)))
    check_scales(
        artifact,
        scales_checksum(config, artifact),
        [record for record in [_any_record(artifact)] if record],
    )
    layout = make_layout(config, chat, target, scales)
    if first is not None and FIDELITY in missing:
        found = measure_codecs(config, layout, first, target)
        artifact.store.write(
            artifact.path(FIDELITY),
            pretty_json({"tokens": len(first.context) - first.half, **found._asdict()}),
        )
    if FIDELITY in codec_files(config):
        check_fidelity(config, artifact, report)
    if lacks_metadata(config, artifact):
        _write_frozen(artifact, target, layout)
    return layout


def codec_files(config: RunConfig) -> tuple[str, ...]:
    """What the codecs need beside the shards: the channel scales, and for a lossy one its
    measured fidelity.
    """
    names = {config.hidden.codec, config.hidden.codec_of_last_hidden}
    return () if names == {"raw"} else (SCALES, FIDELITY) if names & set(LOSSY) else (SCALES,)


def scales_checksum(config: RunConfig, artifact: Artifact) -> str:
    """Checksum of the channel scales, without which a shard's bytes mean nothing; empty for raw
    states.
    """
    return artifact.store.checksum(artifact.path(SCALES)) if SCALES in codec_files(config) else ""


def check_scales(artifact: Artifact, wanted: str, records: Iterable[Record]) -> None:
    """Refuse to mix shards that were encoded with other scales than those that are there now.

    Raises:
        DamagedData: the scales were lost, damaged, or made again elsewhere and came out
            differently.
    """
    others = [record.shard for record in records if record.scales_checksum != wanted]
    if others:
        what = f"shard {others[0]} ({len(others)} in all) was encoded with other channel scales than {SCALES} holds now"
        fix = f"put the old {SCALES} back, or remove the records of those shards to capture them again"
        raise DamagedData(what, where=artifact.url, fix=fix)


def _any_record(artifact: Artifact) -> Record | None:
    shards = artifact.record_shards()
    return artifact.record(shards[0]) if shards else None


class FirstStates(NamedTuple):
    """Tokens spread over the first samples: those the scales are made from, and others that the
    codecs are measured on.
    """

    context: Tensor  # [N, m, D] bfloat16
    last: Tensor  # [N, 1, D] bfloat16, after the final norm
    half: int  # tokens before this one are for the scales; no sample is on both sides


def first_states(config: RunConfig, stage: ShardedStage, chat: Chat, target: Target) -> FirstStates:
    """Up to `2 * SCALE_TOKENS` tokens, at most `ROW_TOKENS` of any sample: one long answer is
    not what the rest is like.
    """
    sides: tuple[list[TargetOutput], list[TargetOutput]] = ([], [])
    for number, row in enumerate(_first_rows(config, stage, chat)):
        output = target.forward(torch.tensor([row.input_ids], device=target.device))
        places = torch.linspace(
            0, len(row.input_ids) - 1, min(ROW_TOKENS, len(row.input_ids)), device=target.device
        ).long()
        sides[number % 2].append(
            TargetOutput(
                output.context[0, places].bfloat16(), output.last_hidden[0, places].bfloat16()
            )
        )
        if all(sum(len(part.last_hidden) for part in side) >= SCALE_TOKENS for side in sides):
            break
    layers, size = len(config.target.layer_ids), int(target.text_config.hidden_size)
    nothing = torch.zeros(0, layers * size, dtype=torch.bfloat16, device=target.device)
    context = torch.cat([nothing, *(part.context for side in sides for part in side)])
    last = torch.cat([nothing[:, :size], *(part.last_hidden for side in sides for part in side)])
    return FirstStates(
        context.unflatten(1, (layers, size)),
        last[:, None],
        sum(len(part.last_hidden) for part in sides[0]),
    )


def _first_rows(config: RunConfig, stage: ShardedStage, chat: Chat) -> Iterator[CaptureRow]:
    """The samples of the first shards, in an order that knows nothing of their length."""
    for record in stage.upstream.records().values():
        answers = read_table(stage.upstream.fetch_shard(record)).to_pylist()
        yield from sorted(
            capture_rows(answers, chat, config.hidden).rows, key=lambda row: row.sample_id
        )


def measure_codecs(
    config: RunConfig, layout: Layout, first: FirstStates, target: Target
) -> Fidelity:
    """How much the codecs keep of tokens that the scales were not made from."""
    context, last = first.context[first.half :], first.last[first.half :]
    kept = config.hidden.last_hidden != "none"
    return measure(
        context,
        layout.context.dequantize(layout.context.quantize(context)),
        last=last.flatten(1) if kept else None,
        decoded_last=layout.last_hidden.dequantize(layout.last_hidden.quantize(last))
        if kept
        else None,
        logits=lambda states: target.logits(states.to(target.dtype)),
    )


def check_fidelity(config: RunConfig, artifact: Artifact, report: Report) -> None:
    """Tell what was measured, and refuse what is past the limits, however often it is tried."""
    kept = json.loads(artifact.store.read(artifact.path(FIDELITY)))
    found = Fidelity(**{name: kept[name] for name in Fidelity._fields})
    numbers = {
        name: round(value, 5) for name, value in found._asdict().items() if value is not None
    }
    log.info(
        "stage=hidden codec=%s %s",
        config.hidden.codec,
        " ".join(f"{name}={value}" for name, value in numbers.items()),
    )
    report({"event": "fidelity", "stage": "hidden", "codec": config.hidden.codec, **numbers})
    refuse(found, config.resources.checks.fidelity, where=artifact.url)


def make_layout(
    config: RunConfig, chat: Chat, target: Target, scales: Mapping[str, Tensor]
) -> Layout:
    """The codecs, and where the states come from, for the schema."""
    settings, size = config.hidden, int(target.text_config.hidden_size)
    context = make_codec(
        settings.codec,
        tensor="context",
        num_layers=len(config.target.layer_ids),
        hidden_size=size,
        compression=settings.compression,
        channel_scale=scales.get("context"),
    )
    last = make_codec(
        settings.codec_of_last_hidden,
        tensor="last_hidden",
        num_layers=1,
        hidden_size=size,
        compression=settings.compression if settings.codec_of_last_hidden == "int8" else "none",
        channel_scale=scales.get("last_hidden"),
    )
    metadata = {
        "target": config.target.model,
        "revision": str(config.target.revision),
        "layers": json.dumps(config.target.layer_ids),
        "last_hidden": "post_final_norm",
        "codec": settings.codec,
        **chat.digests(),
    }
    return Layout(context, last, metadata)


def _write_frozen(artifact: Artifact, target: Target, layout: Layout) -> None:
    """The schema, the target's config, and its embedding and lm_head: all that training needs
    to know of the target.
    """
    artifact.store.write(artifact.path(SCHEMA), layout.schema().serialize().to_pybytes())
    # Where the target lay and which library read it decide nothing, and would make equal caches
    # look different.
    config = {
        key: value
        for key, value in target.text_config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version")
    }
    artifact.store.write(artifact.path(CONFIG), pretty_json(config))
    with artifact.store.staged() as local:
        save_file(frozen_tensors(target), local)
        artifact.store.publish(local, artifact.path(TENSORS))


def frozen_tensors(target: Target) -> dict[str, Tensor]:
    """The target's embedding and lm_head [V, D], which every draft shares and keeps as they are."""
    embedding = target.model.get_input_embeddings().weight
    return {
        "embed_tokens.weight": embedding.detach().cpu().clone(),
        "lm_head.weight": target.lm_head.weight.detach().cpu().clone(),
    }
