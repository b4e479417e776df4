"""A unit of evaluation, decoded: its prompts plainly and speculatively by the same target, one row
of raw counts for each.

With a batch size of 1 the two ways alternate prompt by prompt. With a larger one a unit's prompts
are decoded together, that many at a time, and rows that finish take the prompts that wait.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from deepspec.config.data import SamplingConfig
from deepspec.config.evaluate import EvaluateConfig
from deepspec.evaluate.prompts import Fitting, RenderedPrompt, Unit, render_turns, split_fitting
from deepspec.evaluate.scheduler import Policy
from deepspec.evaluate.speculate import speculate
from deepspec.model.drafter import Drafter
from deepspec.target.chat import Chat
from deepspec.target.conversation import stream_seed
from deepspec.target.generate import Decode, generate
from deepspec.target.model import Target

log = logging.getLogger(__name__)

COUNTS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("benchmark", pa.string()),
        ("domain", pa.string()),
        ("temperature", pa.float64()),
        ("batch_size", pa.int32()),
        ("group", pa.int32()),  # prompts decoded together share a number, and their seconds evenly
        ("prompt", pa.int32()),
        ("turn", pa.int32()),
        ("prompt_digest", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_tokens", pa.int32()),
        ("plain_tokens", pa.int32()),
        ("identical", pa.bool_()),
        ("regret", pa.float32()),  # `logit_gap` of a greedy answer unlike the plain one
        ("proposed", COUNTS),
        ("accepted", COUNTS),
        ("committed", COUNTS),
        ("token_ids", COUNTS),
        ("confidence", pa.list_(pa.list_(pa.float32()))),  # of every drafted token, round by round
        ("seconds", pa.float64()),
        ("draft_seconds", pa.float64()),
        ("verify_seconds", pa.float64()),
        ("plain_seconds", pa.float64()),
    ]
)


class Models(NamedTuple):
    """Target and draft on one device, and how the target's chats are written and end."""

    target: Target
    draft: Drafter
    chat: Chat
    stop_ids: frozenset[int]


class UnitResult(NamedTuple):
    """What a unit's shard holds, and what it lacks."""

    rows: list[dict[str, Any]]  # one per prompt and turn
    # Prompts that were not decoded, each with the reason; their later turns are left out as well.
    skipped: list[dict[str, Any]]


class Decoded(NamedTuple):
    """One prompt decoded both ways."""

    row: dict[str, Any]
    answer: list[int]  # the plain one


class Evaluator:
    """Target and draft with a run's settings."""

    def __init__(self, models: Models, settings: EvaluateConfig, policy: Policy | None) -> None:
        self.models, self.settings, self.policy = models, settings, policy
        self._warm: set[int] = set()  # batch sizes

    def warm_up(self, unit: Unit) -> None:
        """Decode one batch both ways, the first of its size, so that no first-call cost is
        measured.
        """
        if unit.batch_size in self._warm:
            return
        self._warm.add(unit.batch_size)
        prompts = {
            number: render_turns(self.models.chat, turns) for number, turns in unit.prompts.items()
        }
        if usable := dict([*self._fitting(prompts).usable.items()][: unit.batch_size]):
            # The measurement then runs out of memory as well, and reports it.
            with suppress(torch.OutOfMemoryError):
                self._decode(unit, usable, plain_first=True)

    def evaluate(self, unit: Unit) -> UnitResult:
        """Every turn of every prompt; a conversation continues with the plainly decoded answers."""
        self.warm_up(unit)
        result = UnitResult([], [])
        answers: dict[int, list[str]] = {number: [] for number in unit.prompts}
        for turn in range(max(map(len, unit.prompts.values()))):
            prompts = {
                number: render_turns(self.models.chat, turns, answers[number])
                for number, turns in unit.prompts.items()
                if len(answers[number]) == turn < len(turns)
            }
            usable, too_long = self._fitting(prompts)
            for number, detail in too_long.items():
                result.skipped.append(_skipped(number, turn, "too_long", detail))
            if unit.batch_size == 1:
                groups = [{number: prompt} for number, prompt in usable.items()]
            else:
                groups = [usable] if usable else []
            for group in groups:
                first = min(group)
                offset = first - min(unit.prompts)
                try:
                    decoded = self._decode(
                        unit, group, plain_first=(unit.number + offset + turn) % 2 == 0
                    )
                except torch.OutOfMemoryError as error:
                    if unit.batch_size == 1:
                        raise
                    what = f"batch_size={unit.batch_size} does not fit into memory"
                    log.warning("stage=evaluate %s: %s", what, str(error).splitlines()[0])
                    for number in group:
                        result.skipped.append(_skipped(number, turn, "out_of_memory", str(error)))
                    continue
                for number, (row, answer) in decoded.items():
                    result.rows.append({**row, "turn": turn, "group": first})
                    answers[number].append(self.models.chat.decode(answer, self.models.stop_ids))
        return result

    def _fitting(self, prompts: Mapping[int, RenderedPrompt]) -> Fitting:
        return split_fitting(
            prompts,
            max_positions=self.models.target.max_positions,
            max_new_tokens=self.settings.max_new_tokens,
        )

    def _decode(
        self, unit: Unit, group: Mapping[int, RenderedPrompt], *, plain_first: bool
    ) -> dict[int, Decoded]:
        target, draft, _, stop_ids = self.models
        settings = self.settings
        sampling = SamplingConfig(
            temperature=unit.temperature, top_p=settings.top_p, top_k=settings.top_k
        )
        decode = Decode(sampling, settings.max_new_tokens, stop_ids, unit.batch_size)
        prompts = [prompt.input_ids for prompt in group.values()]
        seeds = [
            stream_seed(settings.seed, int(prompt.digest, 16), number)
            for number, prompt in group.items()
        ]

        def plainly() -> tuple[list[list[int]], float]:
            started = time.perf_counter()
            # Its tokens are on the host when it returns.
            answers = generate(target, prompts, decode, seeds=seeds)
            return answers, time.perf_counter() - started

        plain = plainly() if plain_first else None
        traces, seconds = speculate(target, draft, prompts, decode, seeds=seeds, policy=self.policy)
        answers, plain_seconds = plain or plainly()
        clocks = {
            "seconds": seconds.total,
            "draft_seconds": seconds.draft,
            "verify_seconds": seconds.verify,
            "plain_seconds": plain_seconds,
        }
        decoded = {}
        for (number, prompt), trace, answer in zip(group.items(), traces, answers, strict=True):
            identical = answer == trace.token_ids
            is_exact = identical or unit.temperature > 0
            row = {
                "benchmark": unit.benchmark,
                "domain": unit.domain,
                "temperature": unit.temperature,
                "batch_size": unit.batch_size,
                "prompt": number,
                "prompt_digest": prompt.digest,
                "num_prompt_tokens": len(prompt.input_ids),
                "num_tokens": len(trace.token_ids),
                "plain_tokens": len(answer),
                "identical": identical,
                "regret": None
                if is_exact
                else logit_gap(target, prompt.input_ids, trace.token_ids),
                **trace._asdict(),
                "confidence": trace.confidence or None,
                **{name: value / len(group) for name, value in clocks.items()},
            }
            decoded[number] = Decoded(row, answer)
        return decoded


def _skipped(number: int, turn: int, reason: str, detail: str) -> dict[str, Any]:
    return {"prompt": number, "turn": turn, "reason": reason, "detail": detail}


def logit_gap(target: Target, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Largest distance of an answer token's logit from the largest logit at its position.

    One pass of the target over prompt and answer.
    """
    ids = torch.tensor([[*prompt, *answer]], device=target.device)
    logits = target.logits(target.forward(ids).last_hidden[0, len(prompt) - 1 : -1]).float()
    chosen = logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    return float((logits.amax(-1) - chosen).max())
