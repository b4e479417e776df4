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
from deepspec.target.model import Target

SCALE_TOKENS = 2048  # for the scales, and as many again, of other samples, to measure the codecs
ROW_TOKENS = 128  # of one sample at most: one long answer is not like the rest


class StateSample(NamedTuple):
    """Hidden states of tokens spread over several samples."""

    context: Tensor  # [N, m, D] bfloat16
    last_hidden: Tensor  # [N, 1, D] bfloat16, after the final norm


def sample_states(rows: Iterable[CaptureRow], target: Target) -> tuple[StateSample, StateSample]:
    """Tokens to make the scales from, and tokens of other rows to measure the codecs on."""
    num_layers, size = len(target.layer_ids), int(target.text_config.hidden_size)
    nothing = torch.zeros(0, num_layers, size, dtype=torch.bfloat16, device=target.device)
    sides = tuple([StateSample(nothing, nothing[:, :1])] for _ in range(2))
    for number, row in enumerate(rows):
        length = len(row.input_ids)
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
        rows = read_table(answers.fetch_shard(record)).to_pylist()
        yield from sorted(capture_rows(rows, chat, settings).rows, key=lambda row: row.sample_id)
