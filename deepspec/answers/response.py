"""What a server said, as an answer of the target: thinking that it took apart is put back as
the target wrote it.
"""

from __future__ import annotations

from openai.types.chat import ChatCompletion

from deepspec.answers.request import SEEDS
from deepspec.config.target import TargetConfig
from deepspec.target.conversation import AnswerRequest, Refused, Turn

THINKING = {  # by chat family: what the target writes before and behind its thinking
    "qwen": ("<think>\n", "\n</think>\n\n"),
    "gemma4": ("<|channel>thought\n", "\n<channel|>"),
}
# what is left of Gemma4's mark where a server leaves special tokens out of the text
MARKS_LOST = "thought\n"


def read_reply(
    reply: ChatCompletion, request: AnswerRequest, target: TargetConfig, *, endpoint: str
) -> Turn | Refused:
    """One answer (trap A5: what the model generated is what the cache renders).

    Raises:
        ValueError: the reply has no choice, none that ended, or one without text.
    """
    choice = reply.choices[0] if reply.choices else None
    if choice is None or choice.message is None or not choice.finish_reason:
        raise ValueError("an answer without a choice")
    if choice.message.tool_calls:
        return Refused(
            "tool_call",
            "the server took the target's call of a tool apart; start it without a tool parser",
        )
    if choice.finish_reason not in ("stop", "length"):
        return Refused(choice.finish_reason, "the server ended the answer for this reason")
    text, more = choice.message.content or "", choice.message.model_extra or {}
    if not isinstance(text, str):
        raise ValueError("an answer whose content is no text")
    reasoning = more.get("reasoning_content") or more.get("reasoning")
    if reasoning:
        begins, ends = THINKING[target.chat_family]
        # amid the thinking: its end was never written
        cut = choice.finish_reason == "length" and not text
        text = begins + (
            reasoning.lstrip("\n") if cut else reasoning.strip("\n") + ends + text.lstrip("\n")
        )
    elif target.chat_family == "gemma4" and text.startswith(MARKS_LOST):
        return Refused(
            "reasoning",
            "the server left out the marks of the thinking; start it with a reasoning parser",
        )
    text.encode()  # half of a surrogate pair is no text, and could not be stored
    ids, used = (choice.model_extra or {}).get("token_ids"), reply.usage
    num_tokens, num_prompt = (
        (used.completion_tokens or 0, used.prompt_tokens or 0) if used else (len(ids or ()), 0)
    )
    return Turn(
        text,
        ids or None,
        choice.finish_reason,
        num_tokens,
        num_prompt,
        request.seed % SEEDS,
        endpoint,
        reply.model,
    )
