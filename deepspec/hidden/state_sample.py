"""States of some tokens of the first samples, from which scales are made and codecs are measured.

They come from the first shards whatever shards a lane was given, so every lane finds the same.
N tokens, m captured layers, D hidden size.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.tables import read_table
from deepspec.config.data import HiddenConfig
from deepspec.hidden.sequences import CaptureRow, capture_rows
from deepspec.target.chat import Chat
from deepspec.target.model import Target, TargetOutput

SCALE_TOKENS = 2048  # for the scales, and as many again, of other samples, to measure the codecs
ROW_TOKENS = 128  # of one sample at most: one long answer is not like the rest


class StateSample(NamedTuple):
    """Hidden states of tokens spread over several samples."""

    context: Tensor  # [N, m, D] bfloat16
    last_hidden: Tensor  # [N, 1, D] bfloat16, after the final norm


def sample_states(rows: Iterable[CaptureRow], target: Target) -> tuple[StateSample, StateSample]:
    """Tokens to make the scales from, and tokens of other rows to measure the codecs on."""
    parts: tuple[list[TargetOutput], list[TargetOutput]] = ([], [])
    for number, row in enumerate(rows):
        length = len(row.input_ids)
        output = target.forward(torch.tensor([row.input_ids], device=target.device))
        places = torch.linspace(0, length - 1, min(ROW_TOKENS, length), device=target.device).long()
        context, last_hidden = output.context[0, places], output.last_hidden[0, places]
        parts[number % 2].append(TargetOutput(context.bfloat16(), last_hidden.bfloat16()))
        if all(sum(len(each.last_hidden) for each in side) >= SCALE_TOKENS for side in parts):
            break
    return _joined(parts[0], target), _joined(parts[1], target)


def first_rows(answers: Artifact, chat: Chat, settings: HiddenConfig) -> Iterator[CaptureRow]:
    """The samples of the first shards of answers, in an order that is independent of length."""
    for record in answers.records().values():
        rows = read_table(answers.fetch_shard(record)).to_pylist()
        yield from sorted(capture_rows(rows, chat, settings).rows, key=lambda row: row.sample_id)


def _joined(parts: list[TargetOutput], target: Target) -> StateSample:
    num_layers, size = len(target.layer_ids), int(target.text_config.hidden_size)
    empty = torch.zeros(0, num_layers * size, dtype=torch.bfloat16, device=target.device)
    context = torch.cat([empty, *(part.context for part in parts)])
    last_hidden = torch.cat([empty[:, :size], *(part.last_hidden for part in parts)])
    return StateSample(context.unflatten(1, (num_layers, size)), last_hidden[:, None])
