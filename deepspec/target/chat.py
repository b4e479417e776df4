"""Chat rendering, in one place for answers, capture and evaluation: the tokenizer's own template.

The loss mask covers what the target generated, its end-of-turn token included, and nothing that a
template inserted.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from deepspec.artifacts.run import Run
from deepspec.config.target import TargetConfig
from deepspec.errors import DataError, TargetNotFound
from deepspec.messages import Message


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


class Sample(NamedTuple):
    """Token ids of one training sequence and, for each, whether the target generated it."""

    input_ids: list[int]
    loss_mask: list[bool]


class Chat:
    """A tokenizer with its template: messages in, the token ids that a server would see out."""

    def __init__(self, tokenizer: Any, target: TargetConfig) -> None:
        """Refuses a tokenizer that cannot render the target's conversations.

        Raises:
            DataError: it has no template, or not the family's end of a turn.
        """
        where = f"target.model {target.model}"
        marker = CHAT_FAMILIES[target.chat_family].end_of_turn
        self.tokenizer = tokenizer
        self.thinking = target.thinking
        self.end_of_turn: int = tokenizer.convert_tokens_to_ids(marker)
        if self.end_of_turn in (None, tokenizer.unk_token_id):
            raise DataError(
                f"the tokenizer does not know {marker!r}, the end of a turn in the family"
                f" {target.chat_family!r}",
                where=where,
                fix="set target.chat_family to the model's family",
            )
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template", where=where, fix="use an instruct model"
            )

    def stop_ids(self, eos_ids: Iterable[int] = ()) -> frozenset[int]:
        """Token ids that end an answer: the end of a turn, and those that the target names."""
        return frozenset({self.end_of_turn, *eos_ids})

    def digests(self) -> dict[str, str]:
        """Digests of tokenizer and template, equal for two that tokenize alike."""
        texts = {
            "tokenizer_digest": json.dumps(self.tokenizer.get_vocab(), sort_keys=True),
            "chat_template_digest": str(self.tokenizer.chat_template),
        }
        return {
            name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()
        }

    def render(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of the conversation so far, with the generation prompt of the next answer."""
        return list(
            self.tokenizer.apply_chat_template(
                [message.entry() for message in messages],
                tools=tools or None,
                add_generation_prompt=True,
                enable_thinking=self.thinking,
                tokenize=True,
                return_dict=False,
            )
        )

    def decode(self, token_ids: Sequence[int], stop_ids: Collection[int]) -> str:
        """The text of an answer, without the token that ended it.

        Other special tokens, such as the marks around thinking, are part of the text.
        """
        ended = token_ids and token_ids[-1] in stop_ids
        kept = list(token_ids[:-1] if ended else token_ids)
        return str(self.tokenizer.decode(kept, skip_special_tokens=False))

    def answer_ids(self, text: str, *, finished: bool) -> list[int]:
        """Token ids of an answer's text, with the end-of-turn token if it is `finished`."""
        ids = list(self.tokenizer.encode(text, add_special_tokens=False))
        return [*ids, self.end_of_turn] if finished else ids


def load_chat(run: Run) -> Chat:
    """The tokenizer and template of the run's target.

    Raises:
        TargetNotFound: there is no such tokenizer.
        DataError: it cannot render conversations.
    """
    from transformers import AutoTokenizer

    target = run.config.target
    name = str(target_folder(run) or target.model)
    with loading("tokenizer", target):
        return Chat(AutoTokenizer.from_pretrained(name, revision=target.revision), target)


@contextmanager
def loading(part: str, settings: TargetConfig) -> Iterator[None]:
    """Name the target, or its tokenizer, where transformers cannot load it within the block.

    Raises:
        TargetNotFound: with the first line of what transformers reports.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise TargetNotFound(
            f"the {part} cannot be loaded: {str(error).splitlines()[0]}",
            where=f"target.model {settings.model}",
            fix="check the name, or give a local folder",
        ) from None


def target_folder(run: Run) -> Path | None:
    """The local folder of the run's target, or None where it is a name on the hub."""
    if run.config.demo:
        return run.artifact("demo").fetch_folder("target")
    folder = Path(run.config.target.model)
    return folder if folder.is_dir() else None


def build_samples(turns: Sequence[tuple[list[int], list[int]]]) -> list[Sample]:
    """Training sequences of a conversation, from (prompt ids, answer ids) of each of its turns.

    Turns share a sequence while each prompt continues the tokens before it; where the template
    renders earlier turns anew (Qwen3 drops their thinking), the turn starts a sequence of its own,
    so that every supervised token has exactly the context it was generated in.
    """
    samples: list[Sample] = []
    for prompt_ids, answer_ids in turns:
        if not samples or prompt_ids[: len(samples[-1].input_ids)] != samples[-1].input_ids:
            samples.append(Sample([], []))
        current = samples[-1]
        added = prompt_ids[len(current.input_ids) :]
        current.input_ids.extend([*added, *answer_ids])
        current.loss_mask.extend([False] * len(added) + [True] * len(answer_ids))
    return samples
