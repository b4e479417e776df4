"""A server's reply as an answer of the target (trap A5).

What a server separated from the answer as reasoning is put back the way the target wrote it, so
that the cache renders what the model generated.
"""

from openai.types.chat import ChatCompletion

from deepspec.serving.protocol import SEEDS
from deepspec.target.chat import ChatFamily
from deepspec.target.conversation import AnswerRequest, Refused, Turn


def read_reply(
    reply: ChatCompletion, request: AnswerRequest, family: ChatFamily, *, endpoint: str
) -> Turn | Refused:
    """The answer that a reply holds, or why it holds none.

    Raises:
        ValueError: the reply has no choice, none that ended, or one without text.
    """
    choice = reply.choices[0] if reply.choices else None
    if choice is None or choice.message is None or not choice.finish_reason:
        raise ValueError("a reply without a finished choice")
    if choice.message.tool_calls:
        why = "the server parsed the target's tool call; start it without a tool parser"
        return Refused("tool_call", why)
    if choice.finish_reason not in ("stop", "length"):
        return Refused(choice.finish_reason, "the server ended the answer for this reason")
    text = choice.message.content or ""
    if not isinstance(text, str):
        raise ValueError("an answer whose content is not text")
    extra = choice.message.model_extra or {}
    reasoning = extra.get("reasoning_content") or extra.get("reasoning")
    if reasoning:
        # without an answer after it, the limit cut the reasoning off before its end was written
        cut = choice.finish_reason == "length" and not text
        text = family.with_reasoning(reasoning, None if cut else text)
    elif family.stripped_mark and text.startswith(family.stripped_mark):
        why = "the server removed the marks of thinking; start it with a reasoning parser"
        return Refused("reasoning", why)
    text.encode()  # raises ValueError for half of a surrogate pair, which cannot be stored
    # vLLM's names, then SGLang's; vLLM's prompt is the reply's, SGLang's the choice's
    of_choice, of_reply = choice.model_extra or {}, reply.model_extra or {}
    token_ids = _ids(of_choice.get("token_ids") or of_choice.get("response_token_ids"))
    prompt_ids = _ids(of_reply.get("prompt_token_ids") or of_choice.get("prompt_token_ids"))
    usage = reply.usage
    return Turn(
        text,
        token_ids,
        choice.finish_reason,
        num_tokens=(usage.completion_tokens or 0) if usage else len(token_ids or ()),
        num_prompt_tokens=(usage.prompt_tokens or 0) if usage else 0,
        seed=request.seed % SEEDS,
        endpoint=endpoint,
        served_model=reply.model,
        prompt_token_ids=prompt_ids,
    )


def _ids(value: object) -> list[int] | None:
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(token, int) for token in value):
        raise ValueError("token ids that are no integers")
    return value
