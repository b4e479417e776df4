"""What a user runs on a new target: the target's own checks, and those of a draft of each algorithm
built for it.

Of a draft: its loss, gradients, what it sees, and drafting with the cache.

a verified tokens, g block size, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from deepspec.config.data import SamplingConfig
from deepspec.config.draft import (
    BlockDraftConfig,
    ConfidenceConfig,
    Eagle3DraftConfig,
    MarkovConfig,
)
from deepspec.config.families import family_of, text_config
from deepspec.config.target import TargetConfig
from deepspec.errors import DataError
from deepspec.evaluate.speculate import speculate
from deepspec.model.anchors import BlockPlan
from deepspec.model.block_draft import BlockDraft
from deepspec.model.checkpoint import build_draft
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.model.eagle3 import Eagle3Draft
from deepspec.model.spec import DraftSpec
from deepspec.target.conformance import (
    NEW_TOKENS,
    SHORTEST,
    Check,
    check_chat,
    check_target,
    distance,
    make_rows,
    spread,
)
from deepspec.target.generate import Decode, generate
from deepspec.target.loading import load_target
from deepspec.target.model import Target

BLOCK = 4
HEADS = {"markov": MarkovConfig(rank=16), "confidence": ConfidenceConfig()}
ALGORITHMS: dict[str, BlockDraftConfig | Eagle3DraftConfig] = {
    "dspark": BlockDraftConfig(
        algorithm="dspark", block_size=BLOCK, num_layers=2, num_anchors=8, **HEADS
    ),
    "dflash": BlockDraftConfig(algorithm="dflash", block_size=BLOCK, num_layers=2, num_anchors=8),
    "eagle3": Eagle3DraftConfig(algorithm="eagle3", block_size=BLOCK, ttt_length=BLOCK),
}
PROBABILITY = 1e-4  # absolute, float32


class BlockOutputs(NamedTuple):
    states: Tensor  # [K, g, D]
    logits: Tensor  # [K, g, V]
    confidence: Tensor | None  # [K, g]


def block_outputs(draft: BlockDraft, plan: BlockPlan, context: Tensor) -> BlockOutputs:
    """States, logits and confidence logits of blocks whose slots are given the labels as their
    previous tokens.
    """
    states, head = draft.block_states(context, plan), draft.markov_head
    previous = None if head is None else head.markov_w1(plan.previous)
    features = None if head is None or previous is None else head.features(states, previous)
    confidence = None if draft.confidence_head is None else draft.confidence_head(states, previous)
    return BlockOutputs(states, draft.vocabulary().logits(states, features), confidence)


def run_target_checks(folder: Path) -> dict[str, list[Check]]:
    """Checks of the model in `folder`, of its chat template if it has a tokenizer, and of a draft
    of each algorithm.

    Raises:
        ConfigError: a family unknown here, or with parts that drafts do not have.
        DataError: no model there.
    """
    config = _read_config(folder)
    text, family = text_config(config), family_of(config)
    settings = TargetConfig(
        model=str(folder),
        chat_family=family.chat_family,
        dtype="float32",
        layer_ids=spread(text["num_hidden_layers"]),
        mask_token_id=text["vocab_size"] - 1,
    )
    target = load_target(settings, folder=folder)
    rows = make_rows(target)
    checks = {"target": check_target(target, rows), "chat": check_chat(folder, settings)}
    for algorithm in ALGORITHMS:
        # Eagle3 cannot read the embedding output, layer -1.
        of_draft = (
            Target(target.model, [layer for layer in target.layer_ids if layer >= 0])
            if algorithm == "eagle3"
            else target
        )
        short = [row[:SHORTEST] for row in rows]
        checks[algorithm] = check_draft(of_draft, config, short, algorithm=algorithm)
    return checks


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"there is no model here: {error}",
            where=str(folder),
            fix="give a folder with config.json",
        ) from None
    return config


def check_draft(
    target: Target, config: dict[str, Any], rows: Sequence[Sequence[int]], *, algorithm: str
) -> list[Check]:
    """A fresh draft of this algorithm on the target's own states of `rows`."""
    spec = DraftSpec.from_target(
        config,
        ALGORITHMS[algorithm],
        layer_ids=target.layer_ids,
        mask_token_id=target.text_config.vocab_size - 1,
    )
    # Weights of unit gain: with the small ones of a fresh draft, its context would hardly show in
    # what it predicts.
    spec = replace(spec, initializer_range=spec.hidden_size**-0.5)
    embed, lm_head = target.decoder.embed_tokens.weight, target.lm_head.weight
    draft = build_draft(spec, embed=embed.cpu(), lm_head=lm_head.cpu(), seed=0).to(target.device)
    batch = _captured(target, rows)
    checks = _learning(draft, batch)
    first = int(batch.lengths[0])
    ids, mask, context, last = (
        part[:first]
        for part in (batch.input_ids, batch.loss_mask, batch.context, batch.last_hidden)
    )
    single = TrainBatch(ids, mask, batch.lengths[:1], context, last, batch.seeds[:1])
    with torch.inference_mode():
        checks += [
            *_visibility(draft, single),
            _cached_drafting(draft, single),
            _lossless(target, draft, rows),
        ]
    return checks


def _captured(target: Target, rows: Sequence[Sequence[int]]) -> TrainBatch:
    """The rows (of one length) with the target's states; the second half is an answer, and the
    last row ends early.
    """
    ids = torch.tensor(rows, device=target.device)
    num_rows, num_tokens = ids.shape
    output = target.forward(ids)
    lengths = torch.full((num_rows,), num_tokens, device=ids.device)
    lengths[-1] -= 3
    places = torch.arange(num_tokens, device=ids.device).expand(num_rows, -1)
    real = places < lengths[:, None]
    # What a mask takes out of inference mode's tensors is a copy, which may meet a graph.
    context, last = output.context.clone()[real], output.last_hidden.clone()[real]
    return TrainBatch(
        ids[real], (places >= num_tokens // 2)[real], lengths, context, last, tuple(range(num_rows))
    )


def _learning(draft: Drafter, batch: TrainBatch) -> list[Check]:
    output = draft.loss(batch, draft.plan(batch))
    loss = output.numerator / output.denominator
    loss.backward()
    trainable = {
        name: parameter.grad
        for name, parameter in draft.named_parameters()
        if parameter.requires_grad
    }
    bad = [
        name
        for name, grad in trainable.items()
        if grad is None or not grad.isfinite().all() or not grad.any()
    ]
    return [
        Check(
            "loss that is not finite", float(not loss.isfinite()), note=f"loss {loss.item():.3f}"
        ),
        Check(
            "parameters without a gradient",
            float(len(bad)),
            note=", ".join(bad) or f"all {len(trainable)} have one",
        ),
    ]


def uncached_logits(draft: Drafter, batch: TrainBatch, *, verified: int) -> Tensor:
    """Logits [g, V] as training computes them, for the block behind the first `verified` tokens
    of the batch's only sample.
    """
    if isinstance(draft, BlockDraft):
        plan = draft.plan_for(batch, torch.tensor([verified], device=batch.input_ids.device))
        return block_outputs(draft, plan, batch.context).logits[0]
    eagle3 = cast("Eagle3Draft", draft)
    plan_of_all = eagle3.plan(batch._replace(loss_mask=torch.ones_like(batch.loss_mask)))
    states = torch.stack(
        [states[verified - 1] for states in eagle3.step_states(batch, plan_of_all)]
    )
    return eagle3.logits(eagle3.norm(states))


def _visibility(draft: Drafter, batch: TrainBatch) -> list[Check]:
    """Trap D1: what is not known when a block is drafted must not move it, and what is known
    must.
    """
    verified = len(batch.input_ids) - 1 - BLOCK
    base, moved = uncached_logits(draft, batch, verified=verified), []
    for first in (verified, verified - 1):
        context = batch.context.clone()
        context[first:] += 1.0
        moved.append(
            distance(
                uncached_logits(draft, batch._replace(context=context), verified=verified), base
            )
        )
    blind = float(moved[1] == 0.0)
    return [
        Check("moved by states at or behind its anchor", moved[0]),
        Check("blind to the state before its anchor", blind),
    ]


def _cached_drafting(draft: Drafter, batch: TrainBatch) -> Check:
    """The context arrives in two parts with a proposal in between; the distributions are those
    of one uncached pass.
    """
    verified = len(batch.input_ids) - 1 - BLOCK
    cache, sampling = draft.new_cache(1, verified), SamplingConfig(temperature=1.0)
    uniforms, ids = (
        torch.linspace(0.1, 0.9, BLOCK, device=batch.input_ids.device)[None],
        batch.input_ids[None],
    )
    first, context = verified - 3, batch.context[None]
    draft.extend(cache, context[:, :first], ids[:, 1 : first + 1], [first])
    draft.propose(cache, ids[:, first], sampling, uniforms)
    draft.extend(cache, context[:, first:verified], ids[:, first + 1 : verified + 1], [3])
    proposal = draft.propose(cache, ids[:, verified], sampling, uniforms)
    drafted = torch.cat([ids[0, : verified + 1], proposal.tokens[0]])
    wanted = uncached_logits(draft, batch._replace(input_ids=drafted), verified=verified).softmax(
        -1
    )
    found = torch.zeros_like(wanted) if proposal.probs is None else proposal.probs[0]
    return Check("cached and uncached drafting", distance(found, wanted), PROBABILITY)


def _lossless(target: Target, draft: Drafter, rows: Sequence[Sequence[int]]) -> Check:
    """Speculative decoding of rows of different lengths gives the tokens of plain greedy
    decoding.
    """
    prompts = [row[: len(row) // 2 + number] for number, row in enumerate(rows)]
    settings = Decode(SamplingConfig(temperature=0), NEW_TOKENS, frozenset())
    plain = generate(target, prompts, settings, seeds=range(len(prompts)))
    traces, _ = speculate(target, draft, prompts, settings, seeds=range(len(prompts)))
    differing = sum(trace.token_ids != tokens for trace, tokens in zip(traces, plain, strict=True))
    return Check(
        "answers unlike plain decoding",
        float(differing),
        note=f"{len(prompts)} prompts, {NEW_TOKENS} tokens each",
    )
