"""How each family of targets writes a turn's end and its thinking: one record a family."""

from typing import NamedTuple


class ChatFamily(NamedTuple):
    """The marks of one family of chat templates."""

    end_of_turn: str
    thinking_start: str
    thinking_end: str
    stripped_mark: str | None = None
    """What a server that removes special tokens leaves of `thinking_start`."""

    def with_reasoning(self, reasoning: str, answer: str | None) -> str:
        """The text as the target wrote it; `answer` is None where its limit cut it off before."""
        if answer is None:
            return self.thinking_start + reasoning.lstrip("\n")
        thinking = self.thinking_start + reasoning.strip("\n") + self.thinking_end
        return thinking + answer.lstrip("\n")


CHAT_FAMILIES = {
    "qwen": ChatFamily(
        end_of_turn="<|im_end|>", thinking_start="<think>\n", thinking_end="\n</think>\n\n"
    ),
    "gemma4": ChatFamily(
        end_of_turn="<turn|>",
        thinking_start="<|channel>thought\n",
        thinking_end="\n<channel|>",
        stripped_mark="thought\n",
    ),
}
