"""What a user runs on a new target: the target's own checks, and those of a fresh draft of each
algorithm on it: its loss, gradients, what it sees, drafting with the cache, and decoding.

a verified tokens, g block size, T tokens, D hidden size, V vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

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
DFLASH = BlockDraftConfig(algorithm="dflash", block_size=BLOCK, num_layers=2, num_anchors=8)
HEADS = {"markov": MarkovConfig(rank=16), "confidence": ConfidenceConfig()}
ALGORITHMS: dict[str, BlockDraftConfig | Eagle3DraftConfig] = {
    "dspark": DFLASH.model_copy(update={"algorithm": "dspark", **HEADS}),
    "dflash": DFLASH,
    "dflash, anchor_is_context": DFLASH.model_copy(update={"layout": "anchor_is_context"}),
    "eagle3": Eagle3DraftConfig(algorithm="eagle3", block_size=BLOCK, ttt_length=BLOCK),
}
PROBABILITY = 1e-4  # absolute, float32


def run_target_checks(folder: Path) -> dict[str, list[Check]]:
    """Checks of the model in `folder`, its chat template if it has a tokenizer, and drafts of it.

    Raises:
        ConfigError: an unknown family, or one with parts that drafts do not have.
        DataError: no model there.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"there is no model here: {error}"
        fix = "give a folder with config.json"
        raise DataError(what, where=str(folder), fix=fix) from None
    text = text_config(config)
    settings = TargetConfig(
        model=str(folder),
        chat_family=family_of(config).chat_family,
        dtype="float32",
        layer_ids=spread(text["num_hidden_layers"]),
        mask_token_id=text["vocab_size"] - 1,
    )
    target = load_target(settings, folder=folder)
    rows = make_rows(target)
    checks = {"target": check_target(target, rows), "chat": check_chat(folder, settings)}
    # Eagle3 cannot read the embedding output, layer -1.
    layers = [layer for layer in target.layer_ids if layer >= 0]
    for name, algorithm in ALGORITHMS.items():
        of_draft = target
        if name == "eagle3":
            of_draft = Target(target.model, layers, logit_factor=target.logit_factor)
        checks[name] = check_draft(of_draft, config, algorithm, [row[:SHORTEST] for row in rows])
    return checks


def check_draft(
    target: Target,
    config: dict[str, Any],
    algorithm: BlockDraftConfig | Eagle3DraftConfig,
    rows: Sequence[Sequence[int]],
) -> list[Check]:
    """A fresh draft of this algorithm on the target's own states of `rows`, all of one length.

    `config` is the target's config.json.
    """
    spec = DraftSpec.from_target(
        config,
        algorithm,
        layer_ids=target.layer_ids,
        mask_token_id=target.text_config.vocab_size - 1,
    )
    # Weights of unit gain: with the small ones of a fresh draft, its context would hardly show in
    # what it predicts.
    spec = replace(spec, initializer_range=spec.hidden_size**-0.5)
    embed, lm_head = target.embedding.weight, target.lm_head.weight
    draft = build_draft(spec, embed=embed.cpu(), lm_head=lm_head.cpu(), seed=0).to(target.device)
    checks = _learning(draft, _captured(target, rows))
    single = _captured(target, rows[:1])
    with torch.inference_mode():
        checks += _visibility(draft, single)
        checks += [_cached_drafting(draft, single), _lossless(target, draft, rows)]
    return checks


def _captured(target: Target, rows: Sequence[Sequence[int]]) -> TrainBatch:
    """The rows with the target's states; their second halves are answers, the last ends early."""
    ids = torch.tensor(rows, device=target.device)
    num_rows, num_tokens = ids.shape
    output = target.forward(ids)
    lengths = torch.full((num_rows,), num_tokens, device=ids.device)
    lengths[-1] -= 3
    places = torch.arange(num_tokens, device=ids.device).expand_as(ids)
    real = places < lengths[:, None]
    # What a mask takes out of inference mode's tensors is a copy, which may be part of a graph.
    context, last = output.context.clone()[real], output.last_hidden.clone()[real]
    answers = places[real] >= num_tokens // 2
    return TrainBatch(ids[real], answers, lengths, context, last, tuple(range(num_rows)))


def _learning(draft: Drafter, batch: TrainBatch) -> list[Check]:
    output = draft.loss(batch, draft.plan(batch))
    loss = output.numerator / output.denominator
    loss.backward()
    learned = [named for named in draft.named_parameters() if named[1].requires_grad]
    bad = [
        name
        for name, parameter in learned
        if (grad := parameter.grad) is None or not grad.isfinite().all() or not grad.any()
    ]
    infinite = float(not loss.isfinite())
    note = ", ".join(bad) or f"all {len(learned)} have one"
    return [
        Check("loss that is not finite", infinite, note=f"loss {loss.item():.3f}"),
        Check("parameters without a gradient", float(len(bad)), note=note),
    ]


def _uncached_logits(draft: Drafter, batch: TrainBatch, *, verified: int) -> Tensor:
    """Logits [g, V] as training computes them, for the block that follows the first `verified`
    tokens of the batch's only sample.
    """
    if isinstance(draft, BlockDraft):
        plan = draft.plan_for(batch, torch.tensor([verified]))
        block, head = draft.block_states(batch.context, plan), draft.markov_head
        logits = draft.logits(block)
        if head:
            logits = logits + head.markov_w2(head.features(block, head.markov_w1(plan.previous)))
        return logits[0]
    eagle3 = cast("Eagle3Draft", draft)
    steps = eagle3.plan(batch._replace(loss_mask=torch.ones_like(batch.loss_mask)))
    states = torch.stack([step[verified - 1] for step in eagle3.step_states(batch.context, steps)])
    return eagle3.logits(eagle3.norm(states))


def _visibility(draft: Drafter, batch: TrainBatch) -> list[Check]:
    """What is not known when a block is drafted must not change it, and what is known must."""
    verified = len(batch.input_ids) - 1 - BLOCK
    base, moved = _uncached_logits(draft, batch, verified=verified), list[float]()
    for first in (verified, verified - 1):
        context = batch.context.clone()
        context[first:] += 1.0
        changed = _uncached_logits(draft, batch._replace(context=context), verified=verified)
        moved.append(distance(changed, base))
    return [
        Check("moved by states at or behind its anchor", moved[0]),
        Check("blind to the state before its anchor", float(moved[1] == 0.0)),
    ]


def _cached_drafting(draft: Drafter, batch: TrainBatch) -> Check:
    """The context arrives in two parts with a proposal in between; the distributions are those
    of one uncached pass.
    """
    verified = len(batch.input_ids) - 1 - BLOCK
    first = verified - 3
    ids, context = batch.input_ids[None], batch.context[None]
    cache, sampling = draft.new_cache(1, verified), SamplingConfig(temperature=1.0)
    uniforms = torch.linspace(0.1, 0.9, BLOCK, device=ids.device)[None]
    draft.extend(cache, context[:, :first], ids[:, 1 : first + 1], [first])
    draft.propose(cache, ids[:, first], sampling, uniforms)
    draft.extend(cache, context[:, first:verified], ids[:, first + 1 : verified + 1], [3])
    proposal = draft.propose(cache, ids[:, verified], sampling, uniforms)
    drafted = batch._replace(input_ids=torch.cat([ids[0, : verified + 1], proposal.tokens[0]]))
    wanted = _uncached_logits(draft, drafted, verified=verified).softmax(-1)
    found = torch.zeros_like(wanted) if proposal.probs is None else proposal.probs[0]
    return Check("cached and uncached drafting", distance(found, wanted), PROBABILITY)


def _lossless(target: Target, draft: Drafter, rows: Sequence[Sequence[int]]) -> Check:
    """Speculative decoding of rows of different lengths gives the tokens of plain greedy
    decoding.
    """
    prompts = [row[: len(row) // 2 + number] for number, row in enumerate(rows)]
    settings = Decode(SamplingConfig(temperature=0), NEW_TOKENS, frozenset())
    seeds = range(len(prompts))
    plain = generate(target, prompts, settings, seeds=seeds)
    traces, _ = speculate(target, draft, prompts, settings, seeds=seeds)
    differing = sum(trace.token_ids != tokens for trace, tokens in zip(traces, plain, strict=True))
    note = f"{len(prompts)} prompts, {NEW_TOKENS} tokens each"
    return Check("answers unlike plain decoding", float(differing), note=note)
