"""Answers for prompts that have none yet, so that their lengths can be planned with.

They are never trained on and never stored.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

from deepspec.messages import parse_messages
from deepspec.prompts.rows import ROLES
from deepspec.target.chat import Chat

ASSUMED_ANSWER_TOKENS = 640  # two thirds of the mean length of the published training samples
FILLER = " the"  # a token or more everywhere; answers of an assumed length are made of it


def assistant_texts(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The assistant's texts in a source row: the best guess of how long answers will be."""
    return tuple(
        text
        for entry in row.get("messages", row.get("conversations")) or ()
        if ROLES.get(entry.get("role", entry.get("from"))) == "assistant"
        and isinstance(text := entry.get("content", entry.get("value")), str)
    )


def answered(
    prompts: Iterable[tuple[int, str]], texts: Sequence[str], chat: Chat, *, limit: int
) -> tuple[list[dict[str, Any]], str]:
    """Rows as the answers stage would write them, one answer a user turn, and how long those are.

    Prompts are (id, messages); answers are the texts in turn, or filler of an assumed length, cut
    at `limit` tokens.
    """
    origin = "as long as in the source"
    if not texts:
        limit = min(ASSUMED_ANSWER_TOKENS, limit)
        texts = [FILLER * limit]
        origin = f"assumed {limit} tokens each"
    following = cycle(texts)
    rows = []
    for row_id, messages in prompts:
        turns = []
        for message in parse_messages(messages):
            if message.role != "user":
                continue
            ids = chat.answer_ids(text := next(following), finished=False)
            cut = len(ids) >= limit
            turns.append(
                {
                    "text": chat.decode(ids[:limit], ()) if cut else text,
                    "token_ids": None,
                    "finish_reason": "length" if cut else "stop",
                }
            )
        rows.append({"id": row_id, "held_out": False, "messages": messages, "turns": turns})
    return rows, origin
