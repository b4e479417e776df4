"""A unit of a served evaluation: its prompts answered by a plain server and by one with the draft.

Rows are as those of an evaluation in process, with what only a server has added. Of prompts that
are served together, the engine's counters give the rounds of all: they stand in the first row.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from deepspec.config.evaluate import EvaluateConfig
from deepspec.errors import TransientError
from deepspec.evaluate.engine_client import EngineClient, Question, ServedGroup
from deepspec.evaluate.plain_sides import PlainAnswer, PlainGroup, PlainSide
from deepspec.evaluate.prompts import Unit, messages_of, render_turns, too_long
from deepspec.evaluate.results import SCHEMA
from deepspec.evaluate.units import UnitResult, skipped
from deepspec.target.chat import Chat
from deepspec.target.conversation import stream_seed

log = logging.getLogger(__name__)

SERVED_SCHEMA = SCHEMA.append(pa.field("request_seconds", pa.float64())).append(
    pa.field("plain_request_seconds", pa.float64())
)
TRIES = 3  # of a group, at a server that comes back


class ServedUnits:
    """What units are made with: the target's chat, the tokens that end an answer, the settings."""

    def __init__(self, chat: Chat, stop_ids: frozenset[int], settings: EvaluateConfig) -> None:
        self.chat, self.stop_ids, self.settings = chat, stop_ids, settings
        self._warm: set[tuple[str, int]] = set()  # servers, and requests in flight there

    def plain_side(self, server: EngineClient, unit: Unit) -> PlainSide:
        """Every turn of every prompt; a conversation continues with these answers."""
        side = PlainSide(groups=[], skipped=[])
        answers: dict[int, list[str]] = {number: [] for number in unit.prompts}
        for turn in range(max(map(len, unit.prompts.values()))):
            open_ones = {
                number: self.question(unit, number, answers[number])
                for number, turns in unit.prompts.items()
                if len(answers[number]) == turn < len(turns)
            }
            fitting, rejects = self._fitting(server, open_ones, turn)
            side.skipped.extend(rejects)
            alone = unit.batch_size == 1
            for group in [{n: fitting[n]} for n in fitting] if alone else [fitting]:
                if not group:
                    continue
                served = self._serve(server, unit, group)
                found = zip(group, served.answers, strict=True)
                made = [PlainAnswer(prompt=n, **answer._asdict()) for n, answer in found]
                side.groups.append(PlainGroup(turn=turn, seconds=served.seconds, answers=made))
                for answer in made:
                    answers[answer.prompt].append(self._text(answer))
        return side

    def rows(self, server: EngineClient, unit: Unit, plain: PlainSide) -> UnitResult:
        """The same prompts at the server with the draft, and one row for each, both sides in it."""
        result = UnitResult([], [*plain.skipped])
        answers: dict[int, list[str]] = {number: [] for number in unit.prompts}
        for group in plain.groups:
            asked = {
                answer.prompt: self.question(unit, answer.prompt, answers[answer.prompt])
                for answer in group.answers
            }
            for answer in group.answers:
                answers[answer.prompt].append(self._text(answer))
            fitting, rejects = self._fitting(server, asked, group.turn)
            result.skipped.extend(rejects)
            # Both sides of a group have the same prompts, or their seconds would not compare.
            if len(fitting) == len(asked):
                served = self._serve(server, unit, asked)
                result.rows.extend(self._rows(unit, group, asked, served))
            else:
                rest = "a prompt that was served with it does not fit"
                result.skipped.extend(skipped(fitting, group.turn, "too_long", rest))
        return result

    def _text(self, answer: PlainAnswer) -> str:
        return self.chat.decode(answer.token_ids, self.stop_ids)

    def question(self, unit: Unit, number: int, answers: Sequence[str] = ()) -> Question:
        """A prompt of the unit after so many answers, as servers are asked it."""
        turns, settings = unit.prompts[number], self.settings
        prompt = render_turns(self.chat, turns, answers)
        fields = {
            # all of them, or the server takes the model's own from its generation_config.json
            "temperature": unit.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": settings.max_new_tokens,
            "stop_token_ids": sorted(self.stop_ids),
            "skip_special_tokens": False,
            "chat_template_kwargs": {"enable_thinking": self.chat.thinking},
        }
        seed = stream_seed(settings.seed, int(prompt.digest, 16), number)
        return Question(messages_of(turns, answers), prompt, seed, fields)

    def _fitting(
        self, server: EngineClient, questions: Mapping[int, Question], turn: int
    ) -> tuple[dict[int, Question], list[dict[str, Any]]]:
        """The questions that the server has room for, and rejects for the others."""
        fitting, rejects = dict(questions), list[dict[str, Any]]()
        for number, question in questions.items():
            detail = too_long(
                len(question.prompt.input_ids),
                max_positions=server.max_positions,
                max_new_tokens=self.settings.max_new_tokens,
            )
            if detail:
                del fitting[number]
                rejects.extend(skipped([number], turn, "too_long", detail))
        return fitting, rejects

    def _serve(
        self, server: EngineClient, unit: Unit, group: Mapping[int, Question]
    ) -> ServedGroup:
        """The group's answers; before the first one at this number in flight, once unmeasured."""
        questions, size = list(group.values()), unit.batch_size
        for attempt in Retrying(
            retry=retry_if_exception_type(TransientError),
            stop=stop_after_attempt(TRIES),
            before_sleep=lambda state: server.wait_until_up(),
            reraise=True,
        ):
            with attempt:
                if (server.url, size) not in self._warm:
                    server.ask_all(questions[:size], concurrency=size)
                    self._warm.add((server.url, size))
                return server.ask_all(questions, concurrency=size)
        raise AssertionError("an attempt returns or raises")

    def _rows(
        self, unit: Unit, plain: PlainGroup, asked: Mapping[int, Question], served: ServedGroup
    ) -> list[dict[str, Any]]:
        rounds = served.counts.rounds()
        lengths = [len(answer.token_ids) for answer in served.answers]
        stopped = all(answer.token_ids[-1] in self.stop_ids for answer in served.answers)
        counted = {**rounds._asdict(), "committed": rounds.committed(lengths, stopped=stopped)}
        nothing: dict[str, list[int]] = {name: [] for name in counted}
        rows = []
        for at, (own, answer) in enumerate(zip(plain.answers, served.answers, strict=True)):
            prompt = asked[own.prompt].prompt
            rows.append(
                {
                    "benchmark": unit.benchmark,
                    "domain": unit.domain,
                    "temperature": unit.temperature,
                    "batch_size": unit.batch_size,
                    "group": plain.answers[0].prompt,
                    "prompt": own.prompt,
                    "turn": plain.turn,
                    "prompt_digest": prompt.digest,
                    "num_prompt_tokens": len(prompt.input_ids),
                    "num_tokens": len(answer.token_ids),
                    "plain_tokens": len(own.token_ids),
                    "identical": own.token_ids == answer.token_ids,
                    "regret": None,
                    **(nothing if at else counted),
                    "token_ids": answer.token_ids,
                    "confidence": None,
                    "seconds": served.seconds / len(asked),
                    "draft_seconds": 0.0,  # a server does not report its phases
                    "verify_seconds": 0.0,
                    "plain_seconds": plain.seconds / len(asked),
                    "request_seconds": answer.seconds,
                    "plain_request_seconds": own.seconds,
                }
            )
        return rows
