"""The files of a cache that are not shards.

They are the schema, the channel scales, and what training needs to know of the target. The first
process to write the channel scales wins and all others read those; each shard's record names the
scales that it was encoded with. A lossy codec is measured on other samples, and refused if it loses
too much: before any shard is written.

Both are found from some tokens of the first samples, which come from the first shards whatever
shards a lane was given, so every lane finds the same. N tokens, m captured layers, D hidden size.
"""

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
from deepspec.cache.codecs import LOSSY, channel_scale, make_codec
from deepspec.cache.fidelity import Fidelity, measure, refuse
from deepspec.cache.format import Layout
from deepspec.cache.reader import SCALES, SCHEMA
from deepspec.config.data import HiddenConfig
from deepspec.config.run import RunConfig
from deepspec.errors import DamagedData
from deepspec.hidden.capture import row_too_large
from deepspec.hidden.sequences import CaptureRow, capture_rows
from deepspec.model.memory import naming_oom
from deepspec.process.events import Report
from deepspec.storage.store import pretty_json
from deepspec.target.chat import Chat
from deepspec.target.model import Target

log = logging.getLogger(__name__)

TENSORS, CONFIG, FIDELITY = "frozen.safetensors", "target/config.json", "fidelity.json"
# Of a target's config: where it was and which library read it would make equal caches different.
NOT_KEPT = ("_name_or_path", "transformers_version")
SCALE_TOKENS = 2048  # for the scales, and as many again, of other samples, to measure the codecs
ROW_TOKENS = 128  # of one sample at most: one long answer is not like the rest


class StateSample(NamedTuple):
    """Hidden states of tokens spread over several samples."""

    context: Tensor  # [N, m, D] bfloat16
    last_hidden: Tensor  # [N, 1, D] bfloat16, after the final norm


def codec_files(settings: HiddenConfig) -> tuple[str, ...]:
    """What the codecs need: the channel scales, and for a lossy one its measured fidelity."""
    names = {settings.codec, settings.codec_of_last_hidden}
    if names == {"raw"}:
        return ()
    return (SCALES, FIDELITY) if names & set(LOSSY) else (SCALES,)


def metadata_files(settings: HiddenConfig) -> tuple[str, ...]:
    """The files that are sealed together with the shards."""
    scales = (SCALES,) if SCALES in codec_files(settings) else ()
    return (SCHEMA, TENSORS, CONFIG, *scales)


def lacks_metadata(artifact: Artifact, settings: HiddenConfig) -> bool:
    """Whether one of these files is not written yet."""
    return bool(_missing(artifact, metadata_files(settings)))


def write_metadata(
    config: RunConfig, stage: ShardedStage, chat: Chat, target: Target, report: Report
) -> Layout:
    """The layout of the cache, once all files but the shards are written.

    Raises:
        DamagedData: a shard was encoded with other scales than are there.
        FidelityTooLow: the codec loses more of this target's states than
            `resources.checks.fidelity` allows.
    """
    artifact, settings = stage.artifact, config.hidden
    missing = _missing(artifact, codec_files(settings))
    if missing:
        rows = first_rows(stage.upstream, chat, settings)
        for_scales, for_fidelity = sample_states(rows, target, settings)
    if SCALES in missing:
        scales = {
            name: channel_scale(values).cpu().contiguous()
            for name, values in for_scales._asdict().items()
        }
        artifact.store.write_new(artifact.path(SCALES), save(scales))
    check_scales(artifact, settings, artifact.read_records(artifact.record_shards()[:1]).values())
    layout = make_layout(config, chat, target, read_scales(artifact, settings))
    if FIDELITY in missing:
        write_fidelity(artifact, settings, layout, for_fidelity, target)
    if FIDELITY in codec_files(settings):
        kept = json.loads(artifact.read(FIDELITY))
        found = Fidelity(**{name: kept[name] for name in Fidelity._fields})
        values = found._asdict().items()
        numbers = {name: round(value, 5) for name, value in values if value is not None}
        log.info("stage=hidden codec=%s fidelity: %s", settings.codec, numbers)
        report({"event": "fidelity", "stage": "hidden", "codec": settings.codec, **numbers})
        refuse(found, config.resources.checks.fidelity, where=artifact.url)
    if lacks_metadata(artifact, settings):
        artifact.write(SCHEMA, layout.schema.serialize().to_pybytes())
        fields = target.text_config.to_dict().items()
        kept = {key: value for key, value in fields if key not in NOT_KEPT}
        artifact.write(CONFIG, pretty_json(kept))
        write_frozen_tensors(artifact, target)
    return layout


def sample_states(
    rows: Iterable[CaptureRow], target: Target, settings: HiddenConfig
) -> tuple[StateSample, StateSample]:
    """Tokens to make the scales from, and tokens of other rows to measure the codecs on.

    Raises:
        OutOfMemory: a row does not fit by itself.
    """
    num_layers, size = len(target.layer_ids), int(target.text_config.hidden_size)
    nothing = torch.zeros(0, num_layers, size, dtype=torch.bfloat16, device=target.device)
    sides = tuple([StateSample(nothing, nothing[:, :1])] for _ in range(2))
    for number, row in enumerate(rows):
        length = len(row.input_ids)
        with naming_oom(row_too_large(row, device=target.device, settings=settings)):
            output = target.forward(torch.tensor([row.input_ids], device=target.device))
        places = torch.linspace(0, length - 1, min(ROW_TOKENS, length), device=target.device).long()
        context = output.context[0, places].bfloat16().unflatten(1, (num_layers, size))
        last_hidden = output.last_hidden[0, places, None].bfloat16()
        sides[number % 2].append(StateSample(context, last_hidden))
        if all(sum(len(part.context) for part in side) >= SCALE_TOKENS for side in sides):
            break
    for_scales, for_fidelity = (
        StateSample(*map(torch.cat, zip(*side, strict=True))) for side in sides
    )
    return for_scales, for_fidelity


def first_rows(answers: Artifact, chat: Chat, settings: HiddenConfig) -> Iterator[CaptureRow]:
    """The samples of the first shards of answers, in an order that is independent of length."""
    for record in answers.records().values():
        rows = capture_rows(answers.rows(record), chat, settings).rows
        yield from sorted(rows, key=lambda row: row.sample_id)


def _missing(artifact: Artifact, names: Iterable[str]) -> list[str]:
    return [name for name in names if not artifact.store.exists(artifact.path(name))]


def read_scales(artifact: Artifact, settings: HiddenConfig) -> dict[str, Tensor]:
    """The channel scales; none for raw states."""
    if SCALES not in codec_files(settings):
        return {}
    return load(artifact.read(SCALES))


def scales_checksum(artifact: Artifact, settings: HiddenConfig) -> str:
    """Checksum of the channel scales, without which no shard can be read; empty for raw states."""
    if SCALES not in codec_files(settings):
        return ""
    return artifact.store.checksum(artifact.path(SCALES))


def check_scales(artifact: Artifact, settings: HiddenConfig, records: Iterable[Record]) -> None:
    """Refuse to mix shards that were encoded with other scales than those that are there now.

    Raises:
        DamagedData: the scales were lost, damaged, or made again elsewhere and came out
            differently.
    """
    wanted = scales_checksum(artifact, settings)
    others = [record.shard for record in records if record.scales_checksum != wanted]
    if others:
        raise DamagedData(
            f"shard {others[0]} ({len(others)} in all) was encoded with other channel scales than "
            f"{SCALES} holds now",
            where=artifact.url,
            fix=f"put the old {SCALES} back, or remove the records of those shards to capture them "
            "again",
        )


def write_fidelity(
    artifact: Artifact, settings: HiddenConfig, layout: Layout, states: StateSample, target: Target
) -> None:
    """Write `fidelity.json`: how much the codecs keep of tokens that the scales do not know."""
    context, last = states
    if settings.last_hidden == "none":
        last = last[:0]
    found = measure(
        context,
        layout.context.dequantize(layout.context.quantize(context)),
        last=last.flatten(1),
        decoded_last=layout.last_hidden.dequantize(layout.last_hidden.quantize(last)),
        logits=lambda states: target.logits(states.to(target.dtype)),
    )
    artifact.write(FIDELITY, pretty_json({"tokens": len(context), **found._asdict()}))


def make_layout(
    config: RunConfig, chat: Chat, target: Target, scales: Mapping[str, Tensor]
) -> Layout:
    """The codecs, and where the states come from, for the schema."""
    hidden = config.hidden
    sizes = {
        "context": (hidden.codec, len(target.layer_ids)),
        "last_hidden": (hidden.codec_of_last_hidden, 1),
    }
    codecs = {
        tensor: make_codec(
            name,
            num_layers=num_layers,
            hidden_size=int(target.text_config.hidden_size),
            compression=hidden.compression,
            channel_scale=scales.get(tensor),
        )
        for tensor, (name, num_layers) in sizes.items()
    }
    metadata = {
        "target": config.target.model,
        "revision": str(config.target.revision),
        "layers": json.dumps(config.target.layer_ids),
        "last_hidden": "post_final_norm",
        "codec": hidden.codec,
        **chat.digests(),
    }
    return Layout(**codecs, metadata=metadata)


def read_layout(artifact: Artifact, settings: HiddenConfig) -> Layout:
    """The layout as written; there need be no manifest yet."""
    return Layout.of(artifact.read(SCHEMA), read_scales(artifact, settings))


def write_frozen_tensors(artifact: Artifact, target: Target) -> None:
    """Write `frozen.safetensors`: embedding and lm_head [V, D], which every draft shares."""
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in target.frozen.items()}
    with artifact.store.staged() as local:
        save_file(tensors, local)
        artifact.store.publish(local, artifact.path(TENSORS))
