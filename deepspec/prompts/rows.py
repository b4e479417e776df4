"""A row of any source as a prompt: roles checked, answers left out, an id from what is left."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from deepspec.config.data import PromptsConfig
from deepspec.storage.store import canonical_json

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
FOLLOWS = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
DUPLICATE = "duplicate"  # a reason that is not the row's fault


class Rejected(NamedTuple):
    """Why a row cannot be used."""

    reason: str
    detail: str


class Prompt(NamedTuple):
    """A conversation to answer, as it is stored."""

    id: int
    held_out: bool
    domain: str | None
    messages: str  # JSON
    tools: str | None = None  # JSON


class SeenPrompts:
    """The ids of all prompts so far: 1.3 million take about 100 MB, whatever their length."""

    def __init__(self, settings: PromptsConfig) -> None:
        self._keep = settings.duplicates == "keep"
        self._ids = set[int]()
        self._repeats = Counter[int]()

    def add(self, prompt: Prompt) -> Prompt | Rejected:
        """The prompt, with an id of its own if it repeats an earlier one and both are kept."""
        if prompt.id not in self._ids:
            self._ids.add(prompt.id)
            return prompt
        if not self._keep:
            return Rejected(DUPLICATE, "an equal conversation came before")
        self._repeats[prompt.id] += 1
        return prompt._replace(id=_hash(f"{prompt.id}:{self._repeats[prompt.id]}".encode()))


class _UnusableRow(Exception):
    """Raised with the reason and the detail of a rejection."""


def make_prompt(row: Mapping[str, Any], settings: PromptsConfig) -> Prompt | Rejected:
    """A row as a prompt, whose id is a hash of what it keeps of the row."""
    try:
        messages = _messages(row)
        _check_order([message["role"] for message in messages])
        tools = _tools(row.get("tools"))
        kept = _json("bad_text", list(_without_answers(messages)))
    except _UnusableRow as unusable:
        return Rejected(*unusable.args)
    number = _hash((kept + tools).encode())
    domain = row.get("domain")
    return Prompt(
        id=number,
        held_out=_hash(f"{settings.seed}:{number}".encode()) / 2**64 < settings.held_out,
        domain=None if domain is None else str(domain),
        messages=kept,
        tools=tools or None,
    )


def _json(reason: str, value: Any) -> str:
    try:
        return canonical_json(value).decode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: legal in JSON, and not text
        raise _UnusableRow(reason, str(error)) from None


def _without_answers(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All messages but the assistant's, which the target replaces.

    The assistant's calls of tools stay, since the results that follow belong to them alone.
    """
    for message, following in zip(messages, [*messages[1:], None], strict=True):
        called = following is not None and following["role"] == "tool"
        if message["role"] != "assistant" or called:
            yield message


def _hash(data: bytes) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def _check_order(roles: Sequence[str]) -> None:
    """Refuse messages of these roles that are not a conversation.

    The system comes first or not at all, then user and assistant take turns, with tools after the
    assistant that called them.
    """
    turns = roles[1:] if roles[0] == "system" else roles
    if "system" in turns:
        raise _UnusableRow("system_not_first", f"roles are {roles}")
    in_turn = all(second in FOLLOWS[first] for first, second in pairwise(turns))
    if not turns or turns[0] != "user" or not in_turn:
        raise _UnusableRow("roles_out_of_order", f"roles are {roles}")


def _tools(value: Any) -> str:
    """The row's tools as JSON, given as a list or (as Parquet needs) as JSON text of one."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value or None
    except json.JSONDecodeError as error:
        raise _UnusableRow("bad_tools", f"tools are not JSON: {error.msg}") from None
    if tools is None:
        return ""
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise _UnusableRow("bad_tools", "tools are not a list of objects")
    return _json("bad_tools", tools) if tools else ""


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a row in any of the four shapes that sources use."""
    entries = row.get("messages") or row.get("conversations")
    turns, prompt = row.get("turns"), row.get("prompt")
    if not entries and turns and isinstance(turns, list | tuple):
        answer = {"role": "assistant", "content": "-"}
        entries = [entry for turn in turns for entry in ({"role": "user", "content": turn}, answer)]
    elif not entries and isinstance(prompt, str):
        entries = [{"role": "user", "content": prompt}]
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise _UnusableRow("no_messages", f"columns are {sorted(row)}")
    return [_message(entry) for entry in entries]


def _message(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise _UnusableRow("unknown_role", f"a message is a {type(entry).__name__}")
    role = entry.get("role", entry.get("from"))
    content = entry.get("content", entry.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise _UnusableRow("unknown_role", f"role {role!r}")
    more = {key: entry[key] for key in ("tool_calls", "tool_call_id", "name") if entry.get(key)}
    if "tool_calls" in more:
        content = content or ""
    elif not isinstance(content, str) or not content.strip():
        raise _UnusableRow("empty_message", f"the {role} message has no text")
    return {"role": ROLES[role], "content": content, **more}
