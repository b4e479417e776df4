"""A training pass over packed samples against the same samples in padded rows, forward and
backward, on a CPU.

Lengths as of chat data (log-normal, the longest many times the median), a quarter of the real ones
to fit a CPU, and a quarter of the anchors. A padded row is as long as the longest of its
micro-batch and has as many blocks (or scored places) as the one with most; its fill is computed
like the rest, as in any padded batch. Micro-batches hold the same number of tokens, fill included.
Goal: 1.5 times the tokens/s of rows padded in the order in which they are drawn; sorted by length,
padded rows waste less, and that ratio is printed without a goal.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._measure import alternate, result
from benchmarks._training import QWEN3
from deepspec.config.draft import (
    BlockDraftConfig,
    ConfidenceConfig,
    DraftConfig,
    Eagle3DraftConfig,
    MarkovConfig,
)
from deepspec.model.anchors import Samples, plan_places, sample_anchors
from deepspec.model.block_draft import BlockDraft
from deepspec.model.checkpoint import build_draft
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.model.spec import DraftSpec

SAMPLES, MEDIAN, SPREAD, SHORTEST, LONGEST = 48, 100, 0.8, 16, 1024
BATCH_TOKENS = 2048
TARGET = QWEN3 | {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
LAYER_IDS = [1, 4, 7]
DRAFTS: dict[str, DraftConfig] = {
    "dspark": BlockDraftConfig(
        algorithm="dspark",
        num_layers=2,
        num_anchors=128,
        markov=MarkovConfig(rank=32),
        confidence=ConfidenceConfig(),
    ),
    "eagle3": Eagle3DraftConfig(algorithm="eagle3"),
}
ROUNDS = 3


def made(lengths: Sequence[int]) -> list[TrainBatch]:
    """A batch of each sample by itself; two thirds of it are an answer."""
    generator = torch.Generator().manual_seed(1)
    width, size = len(LAYER_IDS) * TARGET["hidden_size"], TARGET["hidden_size"]
    return [
        TrainBatch(
            input_ids=torch.randint(TARGET["vocab_size"] - 1, (length,), generator=generator),
            loss_mask=torch.arange(length) >= length // 3,
            lengths=torch.tensor([length]),
            context=torch.randn(length, width, generator=generator).bfloat16(),
            last_hidden=torch.randn(length, size, generator=generator).bfloat16(),
            seeds=(number,),
        )
        for number, length in enumerate(lengths)
    ]


def packed(samples: Sequence[TrainBatch]) -> TrainBatch:
    ids, mask, lengths, context, last, seeds = zip(*samples, strict=True)
    tensors = (torch.cat(list(parts)) for parts in (ids, mask, lengths, context, last))
    return TrainBatch(*tensors, seeds=tuple(seed for (seed,) in seeds))  # type: ignore[misc]


def padded(samples: Sequence[TrainBatch]) -> TrainBatch:
    """Every sample as long as the longest; what was added counts for nothing."""
    longest = max(len(sample.input_ids) for sample in samples)

    def fill(sample: TrainBatch) -> TrainBatch:
        ids, mask, _, context, last, seeds = sample
        room = longest - len(ids)
        return TrainBatch(
            F.pad(ids, (0, room)),
            F.pad(mask, (0, room)),
            torch.tensor([longest]),
            F.pad(context, (0, 0, 0, room)),
            F.pad(last, (0, 0, 0, room)),
            seeds,
        )

    return packed([fill(sample) for sample in samples])


def grown(places: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """As many places in every sample as in the one with most, what was added at its last token;
    and which were there before.
    """
    each = [places[(places >= start) & (places < end)] for start, end in zip(*samples, strict=True)]
    most = max(len(part) for part in each)
    filled = [
        torch.cat([part, (end - 1).expand(most - len(part))])
        for part, end in zip(each, samples.ends, strict=True)
    ]
    return torch.cat(filled), torch.cat([torch.arange(most) < len(part) for part in each])


def padded_plan(draft: Drafter, batch: TrainBatch) -> Any:
    samples = Samples.of(batch.lengths)
    if isinstance(draft, BlockDraft):
        drawn = sample_anchors(batch, draft.spec.num_anchors)
        return draft.plan_for(batch, grown(drawn, samples)[0])
    plan = draft.plan(batch)
    places, own = grown(plan.places, samples)
    counted = torch.zeros(len(plan.counted), len(places), dtype=torch.bool)
    counted[:, own] = plan.counted
    return plan_places(batch, places, counted)


def groups(samples: Sequence[TrainBatch], *, pads: bool) -> list[list[TrainBatch]]:
    """Consecutive samples of at most `BATCH_TOKENS`, with the fill where they are padded."""
    found: list[list[TrainBatch]] = []
    for sample in samples:
        lengths = [len(each.input_ids) for each in ([*found[-1], sample] if found else [sample])]
        needed = max(lengths) * len(lengths) if pads else sum(lengths)
        if not found or needed > BATCH_TOKENS:
            found.append([])
        found[-1].append(sample)
    return found


def sides(draft: Drafter, samples: Sequence[TrainBatch]) -> dict[str, Callable[[], float]]:
    by_length = sorted(samples, key=lambda sample: len(sample.input_ids))

    def train(batches: Sequence[TrainBatch], plan: Callable[[TrainBatch], Any]) -> float:
        began = time.perf_counter()
        for batch in batches:
            draft.loss(batch, plan(batch)).numerator.backward()
        draft.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    rows = {"padded": samples, "padded, sorted": by_length}
    in_rows = {
        name: [padded(group) for group in groups(order, pads=True)] for name, order in rows.items()
    }
    in_one = [packed(group) for group in groups(samples, pads=False)]
    return {
        "packed": lambda: train(in_one, draft.plan),
        **{
            name: (lambda batches=batches: train(batches, lambda batch: padded_plan(draft, batch)))
            for name, batches in in_rows.items()
        },
    }


def main() -> dict[str, object]:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    lengths = (
        (torch.exp(SPREAD * torch.randn(SAMPLES, generator=generator)) * MEDIAN)
        .long()
        .clamp(SHORTEST, LONGEST)
        .tolist()
    )
    samples, ratios, goals = made(lengths), {}, {}
    tokens_per_s: dict[str, int] = {}
    for algorithm, settings in DRAFTS.items():
        spec = DraftSpec.from_target(
            TARGET, settings, layer_ids=LAYER_IDS, mask_token_id=TARGET["vocab_size"] - 1
        )
        frozen = (
            torch.randn(spec.vocab_size, spec.hidden_size, generator=generator)
            * spec.hidden_size**-0.5
        )
        seconds = alternate(
            sides(build_draft(spec, embed=frozen, lm_head=frozen, seed=0), samples), rounds=ROUNDS
        )
        ratios |= {
            f"{algorithm}: tokens/s, packed/{side}": seconds[side] / seconds["packed"]
            for side in seconds
            if side != "packed"
        }
        goals[f"{algorithm}: tokens/s, packed/padded"] = 1.5
        tokens_per_s |= {
            f"{algorithm} {side}": round(sum(lengths) / value) for side, value in seconds.items()
        }
    return result(
        "packing",
        ratios,
        goals,
        tokens_per_s=tokens_per_s,
        tokens=sum(lengths),
        longest=max(lengths),
    )


if __name__ == "__main__":
    print(json.dumps(main()))
