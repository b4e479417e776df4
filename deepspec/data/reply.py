"""What a server said, as an answer of the target: thinking that it took apart is put back as the target wrote it."""

from __future__ import annotations

from openai.types.chat import ChatCompletion

from deepspec.config import TargetConfig
from deepspec.data.request_body import SEEDS
from deepspec.data.turns import Refused, Request, Turn

THINKING = {  # by chat family: how the target writes its thinking before its answer
    "qwen": "<think>\n{reasoning}\n</think>\n\n{content}",
    "gemma4": "<|channel>thought\n{reasoning}\n<channel|>{content}",
}
MARKS_LOST = "thought\n"  # what is left of Gemma4's mark where a server leaves special tokens out of the text


def read_reply(reply: ChatCompletion, request: Request, target: TargetConfig, *, endpoint: str) -> Turn | Refused:
    """One answer (trap A5: what the model generated is what the cache renders).

    Raises:
        ValueError: the reply has no choice, or none that ended.
    """
    choice = reply.choices[0] if reply.choices else None
    if choice is None or choice.message is None or not choice.finish_reason:
        raise ValueError("an answer without a choice")
    if choice.message.tool_calls:
        return Refused("tool_call", "the server took the target's call of a tool apart; start it without a tool parser")
    if choice.finish_reason not in ("stop", "length"):
        return Refused(choice.finish_reason, "the server ended the answer for this reason")
    text, more = choice.message.content or "", choice.message.model_extra or {}
    reasoning = more.get("reasoning_content") or more.get("reasoning")
    if reasoning:
        text = THINKING[target.chat_family].format(reasoning=reasoning.strip("\n"), content=text.lstrip("\n"))
    elif target.chat_family == "gemma4" and text.startswith(MARKS_LOST):
        return Refused("reasoning", "the server left out the marks of the thinking; start it with a reasoning parser")
    ids, used = (choice.model_extra or {}).get("token_ids"), reply.usage
    num_tokens, num_prompt = (used.completion_tokens, used.prompt_tokens) if used else (len(ids or ()), 0)
    return Turn(text, ids or None, choice.finish_reason, num_tokens, num_prompt, request.seed % SEEDS, endpoint, reply.model)
