"""A row of any source as a prompt: roles checked, what the assistant said left out, an id from
what is left.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from deepspec.config.data import PromptsConfig
from deepspec.storage.store import canonical_json

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
DUPLICATE = "duplicate"  # a reason that is no fault of a row


class Rejected(NamedTuple):
    reason: str
    detail: str


class Prompt(NamedTuple):
    id: int
    held_out: bool
    domain: str | None
    messages: str
    tools: str | None = None


class Seen:
    """Which conversations came before, by id: 1.3 million take about 100 MB, whatever they hold."""

    def __init__(self, settings: PromptsConfig) -> None:
        self._keep = settings.duplicates == "keep"
        self._ids, self._again = set[int](), Counter[int]()

    def named(self, prompt: Prompt) -> Prompt | Rejected:
        """The prompt, with an id of its own where an equal one came before and both are kept."""
        if prompt.id not in self._ids:
            self._ids.add(prompt.id)
            return prompt
        if not self._keep:
            return Rejected(DUPLICATE, "an equal conversation came before")
        self._again[prompt.id] += 1
        return prompt._replace(id=_hash(f"{prompt.id}:{self._again[prompt.id]}".encode()))


def make_prompt(row: Mapping[str, Any], settings: PromptsConfig) -> Prompt | Rejected:
    """A row as a prompt: roles checked, assistant turns dropped, id = hash of what is left."""
    messages = _messages(row)
    if isinstance(messages, Rejected):
        return messages
    if (wrong := _order(messages)) is not None:
        return wrong
    tools = _tools(row.get("tools"))
    if isinstance(tools, Rejected):
        return tools
    kept = [
        message
        for message, following in zip(messages, [*messages[1:], None], strict=True)
        # What the assistant said is said anew, but for its calls of tools: their results are theirs
        # alone.
        if message["role"] != "assistant" or (following is not None and following["role"] == "tool")
    ]
    try:
        content = canonical_json(kept)
    except UnicodeEncodeError as error:  # legal in JSON, and no text: half of a surrogate pair
        return Rejected("bad_text", str(error))
    number = _hash(content + (tools or "").encode())
    draw = _hash(f"{settings.seed}:{number}".encode()) / 2**64
    domain = row.get("domain")
    return Prompt(
        number,
        draw < settings.held_out,
        str(domain) if domain is not None else None,
        content.decode(),
        tools,
    )


def _hash(data: bytes) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def _order(messages: Sequence[Mapping[str, Any]]) -> Rejected | None:
    """Why these messages are no conversation: system only first, then user and assistant in
    turn, tools after their call.
    """
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if "system" in turns:
        return Rejected("system_not_first", f"roles are {roles}")
    follows = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
    if (
        not turns
        or turns[0] != "user"
        or any(second not in follows[first] for first, second in pairwise(turns))
    ):
        return Rejected("roles_out_of_order", f"roles are {roles}")
    return None


def _tools(value: Any) -> str | Rejected | None:
    """The row's tools as JSON, given as a list or (as Parquet needs) as JSON text of one."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value or None
    except json.JSONDecodeError as error:
        return Rejected("bad_tools", f"tools are not JSON: {error.msg}")
    if tools is not None and not (
        isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)
    ):
        return Rejected("bad_tools", "tools are not a list of objects")
    try:
        return canonical_json(tools).decode() if tools else None
    except UnicodeEncodeError as error:
        return Rejected("bad_tools", str(error))


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]] | Rejected:
    """The conversation of a row in any of the four shapes that sources use."""
    entries: Any = row.get("messages") or row.get("conversations")
    if not entries and isinstance(row.get("turns"), list | tuple):
        entries = [
            part
            for turn in row["turns"]
            for part in ({"role": "user", "content": turn}, {"role": "assistant", "content": "-"})
        ]
    if not entries and isinstance(row.get("prompt"), str):
        entries = [{"role": "user", "content": row["prompt"]}]
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        return Rejected("no_messages", f"columns are {sorted(row)}")
    messages = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            return Rejected("unknown_role", f"a message is a {type(entry).__name__}")
        speaker, content = (
            entry.get("role", entry.get("from")),
            entry.get("content", entry.get("value")),
        )
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            return Rejected("unknown_role", f"role {speaker!r}")
        more = {key: entry[key] for key in ("tool_calls", "tool_call_id", "name") if entry.get(key)}
        if "tool_calls" in more:
            content = content or ""
        elif not isinstance(content, str) or not content.strip():
            return Rejected("empty_message", f"the {speaker} message has no text")
        messages.append({"role": SPEAKERS[speaker], "content": content, **more})
    return messages
