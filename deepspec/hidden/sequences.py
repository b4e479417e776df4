"""What capture runs the target over: training sequences of a shard of answers, in batches of
like length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from deepspec.config.data import HiddenConfig
from deepspec.messages import parse_messages, parse_tools
from deepspec.target.chat import Chat, build_samples
from deepspec.target.conversation import conversation_so_far, stream_seed


class CaptureRow(NamedTuple):
    sample_id: int
    held_out: bool
    input_ids: list[int]
    loss_mask: list[bool]


class CaptureRows(NamedTuple):
    # shortest first: consecutive ones make batches that waste little on padding
    rows: list[CaptureRow]
    rejects: list[dict[str, Any]]  # sequences left out, with the reason


def capture_rows(
    answers: Sequence[dict[str, Any]], chat: Chat, settings: HiddenConfig
) -> CaptureRows:
    """The training sequences of a shard of answers, cut behind the last supervised token and at
    `max_length`.

    A sequence without two supervised tokens in a row teaches nothing and is left out.
    """
    rows: list[CaptureRow] = []
    rejects: list[dict[str, Any]] = []
    for answer in answers:
        messages, texts = (
            parse_messages(answer["messages"]),
            [turn["text"] for turn in answer["turns"]],
        )
        turns, tools = [], parse_tools(answer.get("tools"))
        for number, turn in enumerate(answer["turns"]):
            conversation = conversation_so_far(messages, texts[:number])
            ids = turn["token_ids"] or chat.answer_ids(
                turn["text"], finished=turn["finish_reason"] == "stop"
            )
            turns.append((chat.render(conversation or [], tools), list(ids)))
        for number, sample in enumerate(build_samples(turns)):
            input_ids, mask = (
                sample.input_ids[: settings.max_length],
                sample.loss_mask[: settings.max_length],
            )
            if any(first and second for first, second in pairwise(mask)):
                rows.append(
                    CaptureRow(
                        sequence_id(answer["id"], number), answer["held_out"], input_ids, mask
                    )
                )
            else:
                detail = (
                    f"{len(sample.input_ids)} tokens, hidden.max_length is {settings.max_length}"
                )
                rejects.append(
                    {
                        "id": answer["id"],
                        "sequence": number,
                        "reason": "too_little_supervised",
                        "detail": detail,
                    }
                )
    return CaptureRows(sorted(rows, key=in_order), rejects)


def in_order(row: CaptureRow) -> tuple[int, int]:
    """What the rows of a shard are sorted by."""
    return len(row.input_ids), row.sample_id


def sequence_id(row: int, number: int) -> int:
    """The sample id of a row's n-th training sequence; the first has the row's own."""
    return stream_seed(0, row, number) if number else row


def token_batches(rows: Iterable[CaptureRow], batch_tokens: int) -> Iterator[list[CaptureRow]]:
    """Consecutive rows, as many as fit into `batch_tokens` once padded to the longest of them."""
    batch, longest = list[CaptureRow](), 0
    for row in rows:
        longest = max(longest, len(row.input_ids))
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch, longest = [], len(row.input_ids)
        batch.append(row)
    if batch:
        yield batch
