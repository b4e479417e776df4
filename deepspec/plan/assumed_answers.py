"""Answers for prompts that have none yet, so that their lengths can be planned with.

They are never trained on and never stored.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from deepspec.messages import parse_messages
from deepspec.prompts.rows import ROLES
from deepspec.target.chat import Chat

ASSUMED_ANSWER_TOKENS = 640  # two thirds of the mean length of the published training samples
# a word that is one token nearly everywhere; answers of an assumed length are made of it
FILLER = " the"
WORDS_TRIED = 256


def assistant_texts(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The assistant's texts in a source row: the best guess of how long answers will be."""
    entries = row.get("messages", row.get("conversations")) or ()
    turns = [
        (entry.get("role", entry.get("from")), entry.get("content", entry.get("value")))
        for entry in entries
    ]
    return tuple(
        text
        for speaker, text in turns
        if ROLES.get(speaker) == "assistant" and isinstance(text, str)
    )


class AssumedAnswers:
    """Answers for prompts that have none: the source's own, or filler of an assumed length."""

    def __init__(self, chat: Chat, source_answers: Sequence[str], *, limit: int) -> None:
        self.chat, self.limit = chat, limit
        self.origin = "as long as in the source"
        if not source_answers:
            assumed = min(ASSUMED_ANSWER_TOKENS, limit)
            tried = len(chat.answer_ids(FILLER * WORDS_TRIED, finished=False))
            words = max(1, round((assumed - 1) * WORDS_TRIED / tried))
            self.origin = f"assumed {assumed} tokens each"
            source_answers = [FILLER * words]
        self.texts = cycle(source_answers)

    def answered(self, row_id: int, messages: str) -> dict[str, Any]:
        """A prompt's row as the answers stage would write it, one answer a user turn."""
        users = [message for message in parse_messages(messages) if message.role == "user"]
        turns = [self._turn(next(self.texts)) for _ in users]
        return {"id": row_id, "held_out": False, "messages": messages, "turns": turns}

    def _turn(self, text: str) -> dict[str, Any]:
        ids = self.chat.answer_ids(text, finished=False)
        cut = len(ids) >= self.limit
        if cut:
            text = self.chat.decode(ids[: self.limit], ())
        return {"text": text, "token_ids": None, "finish_reason": "length" if cut else "stop"}
