"""A unit of evaluation, decoded: its prompts plainly and speculatively by the same target, one row
of raw counts for each.

With a batch size of 1 the two ways alternate prompt by prompt. With a larger one a unit's prompts
are decoded together, that many at a time, and rows that finish take the prompts that wait.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from deepspec.config.data import SamplingConfig
from deepspec.config.evaluate import EvaluateConfig
from deepspec.evaluate.prompts import RenderedPrompt, Unit, render_turns, too_long
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
    {
        "benchmark": pa.string(),
        "domain": pa.string(),
        "temperature": pa.float64(),
        "batch_size": pa.int32(),
        "group": pa.int32(),  # prompts decoded together share a number, and their seconds evenly
        "prompt": pa.int32(),
        "turn": pa.int32(),
        "prompt_digest": pa.string(),
        "num_prompt_tokens": pa.int32(),
        "num_tokens": pa.int32(),
        "plain_tokens": pa.int32(),
        "identical": pa.bool_(),
        "regret": pa.float32(),  # `logit_gap` of a greedy answer unlike the plain one
        "proposed": COUNTS,
        "accepted": COUNTS,
        "committed": COUNTS,
        "token_ids": COUNTS,
        "confidence": pa.list_(pa.list_(pa.float32())),  # of every drafted token, round by round
        "seconds": pa.float64(),
        "draft_seconds": pa.float64(),
        "verify_seconds": pa.float64(),
        "plain_seconds": pa.float64(),
    }
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

    def evaluate(self, unit: Unit) -> UnitResult:
        """Every turn of every prompt; a conversation continues with the plainly decoded answers."""
        result = UnitResult([], [])
        answers: dict[int, list[str]] = {number: [] for number in unit.prompts}
        for turn in range(max(map(len, unit.prompts.values()))):
            usable: dict[int, RenderedPrompt] = {}
            for number, turns in unit.prompts.items():
                if len(answers[number]) == turn < len(turns):
                    prompt = render_turns(self.models.chat, turns, answers[number])
                    detail = too_long(
                        len(prompt.input_ids),
                        max_positions=self.models.target.max_positions,
                        max_new_tokens=self.settings.max_new_tokens,
                    )
                    if detail:
                        result.skipped.extend(_skipped([number], turn, "too_long", detail))
                    else:
                        usable[number] = prompt
            self._warm_up(unit, usable)
            if unit.batch_size == 1:
                groups = [{number: prompt} for number, prompt in usable.items()]
            else:
                groups = [usable] if usable else []
            for group in groups:
                first = min(group)
                place = unit.number + first - min(unit.prompts) + turn
                try:
                    decoded = self._decode(unit, group, plain_first=place % 2 == 0)
                except torch.OutOfMemoryError as error:
                    if unit.batch_size == 1:
                        raise
                    what = f"batch_size={unit.batch_size} does not fit into memory"
                    log.warning("stage=evaluate %s: %s", what, str(error).splitlines()[0])
                    result.skipped.extend(_skipped(group, turn, "out_of_memory", str(error)))
                    continue
                for row, answer in decoded:
                    result.rows.append({**row, "turn": turn, "group": first})
                    text = self.models.chat.decode(answer, self.models.stop_ids)
                    answers[row["prompt"]].append(text)
        return result

    def _warm_up(self, unit: Unit, prompts: Mapping[int, RenderedPrompt]) -> None:
        """Decode one batch both ways, the first of its size, so that no first-call cost is
        measured.
        """
        if prompts and unit.batch_size not in self._warm:
            self._warm.add(unit.batch_size)
            # The measurement then runs out of memory as well, and reports it.
            with suppress(torch.OutOfMemoryError):
                first = dict(islice(prompts.items(), unit.batch_size))
                self._decode(unit, first, plain_first=True)

    def _decode(
        self, unit: Unit, group: Mapping[int, RenderedPrompt], *, plain_first: bool
    ) -> list[Decoded]:
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
        decoded = []
        for (number, prompt), trace, answer in zip(group.items(), traces, answers, strict=True):
            identical = answer == trace.token_ids
            gap = None
            if not identical and unit.temperature == 0:
                gap = logit_gap(target, prompt.input_ids, trace.token_ids)
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
                "regret": gap,
                **trace._asdict(),
                "confidence": trace.confidence or None,
                **{name: value / len(group) for name, value in clocks.items()},
            }
            decoded.append(Decoded(row, answer))
        return decoded


def _skipped(prompts: Iterable[int], turn: int, reason: str, detail: str) -> list[dict[str, Any]]:
    return [
        {"prompt": number, "turn": turn, "reason": reason, "detail": detail} for number in prompts
    ]


def logit_gap(target: Target, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Largest distance of an answer token's logit from the largest logit at its position.

    One pass of the target over prompt and answer.
    """
    ids = torch.tensor([[*prompt, *answer]], device=target.device)
    logits = target.logits(target.forward(ids).last_hidden[0, len(prompt) - 1 : -1]).float()
    chosen = logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    return float((logits.amax(-1) - chosen).max())
