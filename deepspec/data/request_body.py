"""What a request to an OpenAI-compatible server holds: every parameter under its own name (trap A4)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from deepspec.config import RunConfig
from deepspec.data.chat import Message


def request_body(config: RunConfig, model: str) -> dict[str, Any]:
    """What every request carries; messages, seed, limit and tools come with each.

    What is at its neutral value and not in OpenAI's own schema is left out: servers that do not know such a field refuse it.
    """
    sampling = config.answers.sampling
    extra: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": config.target.thinking}}
    beyond = {"top_k": (sampling.top_k, 0), "min_p": (sampling.min_p, 0.0), "repetition_penalty": (sampling.repetition_penalty, 1.0)}
    extra |= {name: value for name, (value, neutral) in beyond.items() if value != neutral}
    if config.resources.token_ids == "ask":
        extra["return_token_ids"] = True
    body: dict[str, Any] = {"model": model, "temperature": sampling.temperature, "top_p": sampling.top_p, "extra_body": extra}
    if sampling.presence_penalty:
        body["presence_penalty"] = sampling.presence_penalty
    return body


def messages_as_sent(messages: Sequence[Message]) -> Any:
    """Servers take a tool call's arguments as JSON text, where templates take a mapping."""
    entries = [message.entry() for message in messages]
    return [{**entry, "tool_calls": [_call(call) for call in entry["tool_calls"]]} if "tool_calls" in entry else entry for entry in entries]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": call.get("id", ""), "type": "function", "function": {"name": function.get("name"), "arguments": text}}
