"""What a request to an OpenAI-compatible server holds: every parameter under its own name (trap
A4).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from deepspec.config.run import RunConfig
from deepspec.messages import Message

Dialect = Literal["openai", "vllm", "sglang", "transformers"]
SEEDS = 2**31  # servers take seeds of 31 bits
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def request_body(config: RunConfig, model: str, dialect: Dialect) -> dict[str, Any]:
    """What every request to a server of this dialect carries; messages, seed, limit and tools come
    with each.

    What stays unsaid a server takes from the model's own generation_config.json (top_k 20 for
    Qwen3): everything is said where the server is known to take it. Strict servers refuse fields
    beyond OpenAI's schema, so those are sent only where they are not neutral.
    """
    sampling = config.answers.sampling
    beyond = {
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
    }
    body: dict[str, Any] = {
        "model": model,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "chat_template_kwargs": {"enable_thinking": config.target.thinking},
    }
    if dialect == "transformers":  # it takes them in this field alone, and draws only if told to
        body["generation_config"] = json.dumps({**beyond, "do_sample": sampling.temperature > 0})
    elif dialect == "openai":
        body |= {name: value for name, value in beyond.items() if value != NEUTRAL[name]}
    else:
        # the marks of thinking are such tokens
        body |= {**beyond, "top_k": sampling.top_k or -1, "skip_special_tokens": False}
    if config.resources.servers.token_ids == "ask":
        body["return_token_ids"] = True
    if sampling.presence_penalty:
        body["presence_penalty"] = sampling.presence_penalty
    return body


def messages_as_sent(messages: Sequence[Message]) -> Any:
    """Servers take a tool call's arguments as JSON text, where templates take a mapping."""
    entries = [message.entry() for message in messages]
    return [
        {**entry, "tool_calls": [_call(call) for call in entry["tool_calls"]]}
        if "tool_calls" in entry
        else entry
        for entry in entries
    ]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": call.get("id", ""),
        "type": "function",
        "function": {"name": function.get("name"), "arguments": text},
    }
