"""Training sequences of a shard of answers, in batches of similar length: what capture runs on."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from deepspec.config.data import HiddenConfig
from deepspec.messages import parse_messages, parse_tools
from deepspec.target.chat import Chat, Sample, build_samples
from deepspec.target.conversation import conversation_so_far, stream_seed


class CaptureRow(NamedTuple):
    """One training sequence."""

    sample_id: int
    held_out: bool
    input_ids: list[int]
    loss_mask: list[bool]


class CaptureRows(NamedTuple):
    """The training sequences of some answers."""

    rows: list[CaptureRow]  # shortest first: consecutive ones waste little on padding
    rejects: list[dict[str, Any]]  # sequences left out, with the reason


def capture_rows(
    answers: Iterable[dict[str, Any]], chat: Chat, settings: HiddenConfig
) -> CaptureRows:
    """The training sequences of a shard of answers, in the order in which they are captured.

    A sequence ends after its last supervised token or at `hidden.max_length`. One without two
    supervised tokens in a row teaches nothing and is left out.
    """
    rows = []
    rejects = []
    for answer in answers:
        for number, sample in enumerate(_sequences(answer, chat)):
            input_ids = sample.input_ids[: settings.max_length]
            mask = sample.loss_mask[: settings.max_length]
            if any(first and second for first, second in pairwise(mask)):
                sample_id = sequence_id(answer["id"], number)
                rows.append(CaptureRow(sample_id, answer["held_out"], input_ids, mask))
                continue
            rejects.append(
                {
                    "id": answer["id"],
                    "sequence": number,
                    "reason": "too_little_supervised",
                    "detail": f"{len(sample.input_ids)} tokens, "
                    f"hidden.max_length is {settings.max_length}",
                }
            )
    return CaptureRows(sorted(rows, key=capture_order), rejects)


def _sequences(answer: dict[str, Any], chat: Chat) -> list[Sample]:
    """The whole training sequences of one row of answers."""
    messages, tools = parse_messages(answer["messages"]), parse_tools(answer.get("tools"))
    texts = [turn["text"] for turn in answer["turns"]]
    turns = []
    for number, turn in enumerate(answer["turns"]):
        # absent in shards without any
        prompt = turn.get("prompt_token_ids")
        if not prompt:
            prompt = chat.render(conversation_so_far(messages, texts[:number]) or [], tools)
        ids = turn["token_ids"]
        if not ids:
            ids = chat.answer_ids(turn["text"], finished=turn["finish_reason"] == "stop")
        turns.append((prompt, list(ids)))
    return build_samples(turns)


def capture_order(row: CaptureRow) -> tuple[int, int]:
    """The key by which a shard's rows are sorted."""
    return len(row.input_ids), row.sample_id


def sequence_id(row: int, number: int) -> int:
    """The sample id of a row's n-th training sequence; the first has the row's own."""
    return stream_seed(0, row, number) if number else row


def token_batches(rows: Iterable[CaptureRow], batch_tokens: int) -> Iterator[list[CaptureRow]]:
    """Consecutive rows, as many as fit into `batch_tokens` once padded to the longest of them."""
    batch = list[CaptureRow]()
    longest = 0
    for row in rows:
        longest = max(longest, len(row.input_ids))
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
            longest = len(row.input_ids)
        batch.append(row)
    if batch:
        yield batch
