"""What a request to an OpenAI-compatible server holds: each parameter by its own name (trap A4)."""

import json
from collections.abc import Sequence
from typing import Any, Literal

from deepspec.config.data import AnswerSamplingConfig
from deepspec.messages import Message

Dialect = Literal["openai", "vllm", "sglang", "transformers"]
SEEDS = 2**31  # servers take seeds of 31 bits
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def common_fields(
    sampling: AnswerSamplingConfig, dialect: Dialect, *, thinking: bool
) -> dict[str, Any]:
    """The fields that every request to a server of this dialect carries.

    What a request leaves out, a server takes from the model's own generation_config.json (top_k 20
    for Qwen3), so everything that the server understands is sent. Strict servers refuse fields
    beyond OpenAI's schema, so `openai` sends those only where they are not neutral.
    """
    extended = {name: getattr(sampling, name) for name in NEUTRAL}
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "chat_template_kwargs": {"enable_thinking": thinking},
    }
    if sampling.presence_penalty:
        fields["presence_penalty"] = sampling.presence_penalty
    match dialect:
        case "transformers":  # takes the others here alone, and samples only with `do_sample`
            sampled = {**extended, "do_sample": sampling.temperature > 0}
            fields["generation_config"] = json.dumps(sampled)
        case "openai":
            fields |= {name: value for name, value in extended.items() if value != NEUTRAL[name]}
        case _:
            # the marks around thinking are special tokens
            fields |= {**extended, "top_k": sampling.top_k or -1, "skip_special_tokens": False}
    return fields


def sent_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as servers take them: a tool call's arguments are JSON text there."""
    entries = [message.entry() for message in messages]
    for entry in entries:
        if "tool_calls" in entry:
            entry["tool_calls"] = [_sent_call(call) for call in entry["tool_calls"]]
    return entries


def _sent_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": call.get("id", ""),
        "type": "function",
        "function": {"name": function.get("name"), "arguments": arguments},
    }
