"""The messages of a conversation, as rows store them, templates render them and servers receive
them.
"""

import json
from collections.abc import Sequence
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


def in_api_order(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools with their keys in the order of OpenAI's schema, and others after them.

    Templates write tools as they find them, and targets know them in this order; vLLM renders it
    whatever it receives.
    """
    return None if tools is None else [_in_api_order(tool) for tool in tools]


def in_stored_order(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools with all keys sorted, as rows store them."""
    return parse_tools(json.dumps(tools, sort_keys=True)) if tools else None


def _in_api_order(tool: dict[str, Any]) -> dict[str, Any]:
    ordered = _beginning_with(("type", "function"), tool)
    function = ordered.get("function")
    if isinstance(function, dict):
        ordered["function"] = _beginning_with(("name", "description", "parameters"), function)
    return ordered


def _beginning_with(keys: Sequence[str], entries: dict[str, Any]) -> dict[str, Any]:
    return {key: entries[key] for key in keys if key in entries} | entries
