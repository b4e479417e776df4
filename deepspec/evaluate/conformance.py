"""What a user runs on a new target: the target's own checks, and those of a draft of each algorithm
built for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepspec.config.families import family_of, text_config
from deepspec.config.target import TargetConfig
from deepspec.errors import DataError
from deepspec.evaluate.draft_checks import ALGORITHMS, check_draft
from deepspec.target.conformance import SHORTEST, Check, check_chat, check_target, make_rows, spread
from deepspec.target.loading import load_target
from deepspec.target.model import Target

<<<<<<< HEAD
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

=======
>>>>>>> 593ecb2 (Conformance: the checks of a draft are a file of their own; outputs of blocks belong to the vectors that need them)

def run_target_checks(folder: Path) -> dict[str, list[Check]]:
    """Checks of the model in `folder`, its chat template if it has a tokenizer, and drafts of it.

    Raises:
        ConfigError: an unknown family, or one with parts that drafts do not have.
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
    # Eagle3 cannot read the embedding output, layer -1.
    layers = [layer for layer in target.layer_ids if layer >= 0]
    for name, algorithm in ALGORITHMS.items():
        of_draft = Target(target.model, layers) if name == "eagle3" else target
        checks[name] = check_draft(of_draft, config, algorithm, [row[:SHORTEST] for row in rows])
    return checks


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"there is no model here: {error}"
        fix = "give a folder with config.json"
        raise DataError(what, where=str(folder), fix=fix) from None
    return config
