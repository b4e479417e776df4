"""Answers for prompts that have none yet, so that their lengths can be planned with: never
trained on, never stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

from deepspec.config.run import RunConfig
from deepspec.messages import parse_messages
from deepspec.prompts.rows import ROLES
from deepspec.target.chat import Chat

ASSUMED_ANSWER_TOKENS = 640  # two thirds of the mean length of the published training samples
# a word that is one token nearly everywhere; answers of an assumed length are made of it
FILLER = " the"
WORDS_TRIED = 256


def assistant_texts(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What the assistant says in a source row: not used as answers, but the best guess of how
    long they will be.
    """
    entries = row.get("messages", row.get("conversations")) or ()
    said = [
        (entry.get("role", entry.get("from")), entry.get("content", entry.get("value")))
        for entry in entries
    ]
    return tuple(
        text
        for speaker, text in said
        if ROLES.get(speaker) == "assistant" and isinstance(text, str)
    )


class StandIns:
    """Answers for prompts that have none: the source's own, or filler of an assumed length."""

    def __init__(self, config: RunConfig, chat: Chat, source_answers: Sequence[str]) -> None:
        self.chat, self.limit = chat, config.answers.max_new_tokens
        assumed = min(ASSUMED_ANSWER_TOKENS, self.limit)
        words = max(
            1,
            round(
                (assumed - 1)
                * WORDS_TRIED
                / len(chat.answer_ids(FILLER * WORDS_TRIED, finished=False))
            ),
        )
        self.spare = cycle(source_answers or [FILLER * words])
        self.origin = (
            "as long as in the source" if source_answers else f"assumed {assumed} tokens each"
        )

    def answered(self, row_id: int, messages: str, texts: Sequence[str]) -> dict[str, Any]:
        users = [message for message in parse_messages(messages) if message.role == "user"]
        answers = [*texts[: len(users)], *islice(self.spare, max(0, len(users) - len(texts)))]
        return {
            "id": row_id,
            "held_out": False,
            "messages": messages,
            "turns": [self._turn(text) for text in answers],
        }

    def _turn(self, text: str) -> dict[str, Any]:
        ids = self.chat.answer_ids(text, finished=False)
        cut = len(ids) >= self.limit
        if cut:
            text = self.chat.decode(ids[: self.limit], ())
        return {"text": text, "token_ids": None, "finish_reason": "length" if cut else "stop"}
