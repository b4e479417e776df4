"""The messages of a conversation, as rows store them, templates render them and servers receive
them.
"""

import json
from typing import Any, NamedTuple


class Message(NamedTuple):
    """One message of a conversation, with the tool calls it makes or answers."""

    role: str
    content: str
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def entry(self) -> dict[str, Any]:
        """The message as templates and servers take it: only the keys that it has."""
        return {key: value for key, value in self._asdict().items() if value is not None}


def parse_messages(text: str) -> list[Message]:
    """The messages of a row's JSON text."""
    return [
        Message(**{field: entry.get(field) for field in Message._fields})
        for entry in json.loads(text)
    ]


def parse_tools(text: str | None) -> list[dict[str, Any]] | None:
    """The tools that a conversation may call; None where there are none."""
    return list(json.loads(text)) if text else None
