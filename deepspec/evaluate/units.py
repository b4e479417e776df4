"""A unit of evaluation, decoded: its prompts plainly and speculatively by the same target, one row
of raw counts for each.

With a batch size of 1 the two ways take turns prompt by prompt; with a larger one a unit's prompts
are decoded together, as many at a time, and rows that finish take the prompts that wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from deepspec.config.data import SamplingConfig
from deepspec.config.evaluate import EvaluateConfig
from deepspec.evaluate.prompts import Fitting, RenderedPrompt, Unit, render, split_fitting
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
        # of a greedy answer unlike the plain one: how far below the largest its tokens' logits are
        # at most
        ("regret", pa.float32()),
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
    target: Target
    draft: Drafter
    chat: Chat
    stop_ids: frozenset[int]


class UnitResult(NamedTuple):
    rows: list[dict[str, Any]]  # one per prompt and turn
    # prompts that were not decoded, each with the reason; their later turns go with them
    skipped: list[dict[str, Any]]


class Evaluator:
    """Target and draft with a run's settings."""

    def __init__(self, models: Models, settings: EvaluateConfig, policy: Policy | None) -> None:
        self.models, self.settings, self.policy = models, settings, policy
        self._warm: set[int] = set()  # batch sizes

    def warm_up(self, unit: Unit) -> None:
        """Decode one batch both ways, the first of its size, so that no first-call cost lands
        in a measurement.
        """
        if unit.batch_size in self._warm:
            return
        self._warm.add(unit.batch_size)
        prompts = {
            number: render(self.models.chat, turns) for number, turns in enumerate(unit.prompts)
        }
        if usable := dict(list(self._fitting(prompts).usable.items())[: unit.batch_size]):
            # then the measurement runs out of it as well, and says so
            with suppress(torch.OutOfMemoryError):
                self._decode(unit, usable, plain_first=True)

    def evaluate(self, unit: Unit) -> UnitResult:
        """Every turn of every prompt; a conversation goes on with the plainly decoded answers."""
        self.warm_up(unit)
        rows, skipped = list[dict[str, Any]](), list[dict[str, Any]]()
        answers: dict[int, list[str]] = {
            number: [] for number in range(unit.first, unit.first + len(unit.prompts))
        }
        for turn in range(max(map(len, unit.prompts))):
            waiting = [
                number
                for number, given in answers.items()
                if len(given) == turn < len(unit.prompts[number - unit.first])
            ]
            prompts = {
                number: render(self.models.chat, unit.prompts[number - unit.first], answers[number])
                for number in waiting
            }
            usable, too_long = self._fitting(prompts)
            skipped += [
                {"prompt": number, "turn": turn, "reason": "too_long", "detail": detail}
                for number, detail in too_long.items()
            ]
            together = max(len(usable), 1) if unit.batch_size > 1 else 1
            for start in range(0, len(usable), together):
                group = dict(list(usable.items())[start : start + together])
                first = min(group)
                try:
                    found = self._decode(
                        unit, group, plain_first=(unit.number + first - unit.first + turn) % 2 == 0
                    )
                except torch.OutOfMemoryError as error:
                    if unit.batch_size == 1:
                        raise
                    log.warning(
                        "stage=evaluate batch_size=%d does not fit into memory: %s",
                        unit.batch_size,
                        str(error).splitlines()[0],
                    )
                    skipped += [
                        {
                            "prompt": number,
                            "turn": turn,
                            "reason": "out_of_memory",
                            "detail": str(error),
                        }
                        for number in group
                    ]
                    continue
                for number, (row, plain) in found.items():
                    rows.append({**row, "turn": turn, "group": first})
                    answers[number].append(self.models.chat.decode(plain, self.models.stop_ids))
        return UnitResult(rows, skipped)

    def _fitting(self, prompts: Mapping[int, RenderedPrompt]) -> Fitting:
        limits = {
            "max_positions": self.models.target.max_positions,
            "max_new_tokens": self.settings.max_new_tokens,
        }
        return split_fitting(prompts, **limits)

    def _decode(
        self, unit: Unit, group: Mapping[int, RenderedPrompt], *, plain_first: bool
    ) -> dict[int, tuple[dict[str, Any], list[int]]]:
        """A row of each prompt of the group, and its plainly decoded answer."""
        target, draft, _, stop_ids = self.models
        sampling = SamplingConfig(
            temperature=unit.temperature, top_p=self.settings.top_p, top_k=self.settings.top_k
        )
        decode = Decode(sampling, self.settings.max_new_tokens, stop_ids, unit.batch_size)
        prompts = [prompt.input_ids for prompt in group.values()]
        seeds = [
            stream_seed(self.settings.seed, int(prompt.digest, 16), number)
            for number, prompt in group.items()
        ]

        def plainly() -> tuple[list[list[int]], float]:
            started = time.perf_counter()
            # its tokens are on the host when it returns
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
        found = {}
        for (number, prompt), trace, answer in zip(group.items(), traces, answers, strict=True):
            identical = answer == trace.token_ids
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
                if identical or unit.temperature > 0
                else logit_gap(target, prompt.input_ids, trace.token_ids),
                **trace._asdict(),
                **{name: value / len(group) for name, value in clocks.items()},
            }
            found[number] = ({**row, "confidence": trace.confidence or None}, answer)
        return found


def logit_gap(target: Target, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """How far below the largest logit those of the answer's tokens are at most, in one pass of
    the target over all of them.
    """
    ids = torch.tensor([[*prompt, *answer]], device=target.device)
    logits = target.logits(target.forward(ids).last_hidden[0, len(prompt) - 1 : -1]).float()
    chosen = logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    return float((logits.amax(-1) - chosen).max())
