"""A unit of evaluation, decoded: its prompts plainly and speculatively by the same target, one row
of raw counts for each.

With a batch size of 1 the two ways alternate prompt by prompt. With a larger one a unit's prompts
are decoded together, that many at a time, and rows that finish take the prompts that wait. A
batch size that memory has no room for is left out; of the smallest one a half is measured instead,
and named in the rows.
"""

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from deepspec.config.data import SamplingConfig
from deepspec.config.evaluate import EvaluateConfig
from deepspec.errors import OutOfMemory
from deepspec.evaluate.prompts import RenderedPrompt, Unit, render_turns, too_long
from deepspec.evaluate.scheduler import Policy
from deepspec.evaluate.speculate import speculate
from deepspec.model.drafter import Drafter
from deepspec.model.loss_terms import softcap
from deepspec.model.memory import free_bytes, is_out_of_memory
from deepspec.target.chat import Chat
from deepspec.target.conversation import stream_seed
from deepspec.target.generate import Decode, generate
from deepspec.target.model import Target

log = logging.getLogger(__name__)


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


class _BatchTooLarge(Exception):
    """A batch size that memory has no room for."""


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
                        result.skipped.extend(skipped([number], turn, "too_long", detail))
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
                    decoded = self._decode_what_fits(unit, group, plain_first=place % 2 == 0)
                except _BatchTooLarge as error:
                    result.skipped.extend(skipped(group, turn, "out_of_memory", str(error)))
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
            first = dict(islice(prompts.items(), unit.batch_size))
            # The measurement then runs out of memory as well, and reports it.
            with suppress(_BatchTooLarge):
                self._decode_what_fits(unit, first, plain_first=True)

    def _decode_what_fits(
        self, unit: Unit, group: Mapping[int, RenderedPrompt], *, plain_first: bool
    ) -> list[Decoded]:
        """The group at the unit's batch size; the smallest of `evaluate.batch_sizes` gives way to
        half of it and so on where memory runs out.

        Raises:
            _BatchTooLarge: a larger one does not fit: its prompts are decoded at a smaller one.
            OutOfMemory: one prompt by itself does not fit.
        """
        size = unit.batch_size
        while True:
            try:
                return self._decode(unit, group, size, plain_first=plain_first)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise self._too_large(unit, group) from error
                why = str(error).splitlines()[0]
            # Out of reach of the error, whose frames hold the tensors of the attempt.
            self.models.target.shelf.release()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            what = f"batch_size={size} does not fit into memory"
            if min(self.settings.batch_sizes) < unit.batch_size:
                log.warning("stage=evaluate %s, its prompts are left out: %s", what, why)
                raise _BatchTooLarge(f"{what}: {why}")
            size //= 2
            log.warning("stage=evaluate %s, decoded at batch_size=%d instead: %s", what, size, why)

    def _too_large(self, unit: Unit, group: Mapping[int, RenderedPrompt]) -> OutOfMemory:
        target, limit = self.models.target, self.settings.max_new_tokens
        number, length = max(
            ((number, len(prompt.input_ids)) for number, prompt in group.items()), key=itemgetter(1)
        )
        need, free = target.row_bytes(length + limit) / 1e9, free_bytes(target.device) / 1e9
        return OutOfMemory(
            f"a prompt of {length} tokens and its answer of up to {limit} do not fit into memory"
            f" next to target and draft: their keys and values in the target alone need"
            f" {need:.3f} GB, {free:.3f} GB are free",
            where=f"benchmark {unit.benchmark}, prompt {number}",
            fix=f"lower evaluate.max_new_tokens (now {limit}), or evaluate on a device with more"
            " memory",
        )

    def _decode(
        self, unit: Unit, group: Mapping[int, RenderedPrompt], batch_size: int, *, plain_first: bool
    ) -> list[Decoded]:
        target, draft, _, stop_ids = self.models
        settings = self.settings
        sampling = SamplingConfig(
            temperature=unit.temperature, top_p=settings.top_p, top_k=settings.top_k
        )
        decode = Decode(sampling, settings.max_new_tokens, stop_ids, batch_size)
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
                gap = logit_gap(target, prompt.input_ids, answer, trace.token_ids)
            row = {
                "benchmark": unit.benchmark,
                "domain": unit.domain,
                "temperature": unit.temperature,
                "batch_size": batch_size,
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


def skipped(prompts: Iterable[int], turn: int, reason: str, detail: str) -> list[dict[str, Any]]:
    """Prompts that are not decoded from this turn on, as rejects."""
    return [
        {"prompt": number, "turn": turn, "reason": reason, "detail": detail} for number in prompts
    ]


def logit_gap(
    target: Target, prompt: Sequence[int], plain: Sequence[int], speculative: Sequence[int]
) -> float:
    """How far apart the target puts the two tokens at which these answers first differ.

    One pass over the prompt and the tokens before them. The two logits are products in float32,
    whatever the target's dtype: logits of 16 to 32 are 0.125 apart in bfloat16. Infinite where one
    answer only ends before the other, which no rounding does.
    """
    pairs = enumerate(zip(plain, speculative, strict=False))
    differing = next(((place, list(pair)) for place, pair in pairs if pair[0] != pair[1]), None)
    if differing is None:
        return math.inf
    place, tokens = differing
    ids = torch.tensor([[*prompt, *plain[:place]]], device=target.device)
    state, head = target.forward(ids).last_hidden[0, -1], target.lm_head
    bias = None if head.bias is None else head.bias[tokens].float()
    logits = softcap(F.linear(state.float(), head.weight[tokens].float(), bias), target.softcap)
    first, second = logits.tolist()
    return abs(first - second)
