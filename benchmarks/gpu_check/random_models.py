"""Targets and drafts with random weights, made on the device: at Qwen3-4B's shape, or tiny."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks._training import QWEN3, QWEN3_4B
from benchmarks.gpu_check.section import Bench
from deepspec.config.recipes import load_run
from deepspec.config.run import RunConfig
from deepspec.model.checkpoint import empty_draft
from deepspec.model.drafter import Drafter
from deepspec.model.spec import DraftSpec
from deepspec.target.model import Target

TINY = QWEN3 | {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SETTINGS = {  # of the recipes' targets, by whether it is the tiny one
    False: ("dspark-qwen3-4b", []),
    True: ("dspark-demo", ["target.layer_ids=[-1,0,2]", "draft.num_anchors=4"]),
}


def recipe(bench: Bench, *overrides: str) -> RunConfig:
    """The run whose shapes are checked."""
    name, own = SETTINGS[bench.rehearse]
    return load_run(name, [*own, *overrides], store=str(bench.scratch))


def target_config(bench: Bench, *, num_layers: int | None = None) -> dict[str, Any]:
    shape = TINY if bench.rehearse else QWEN3_4B
    return shape | ({} if num_layers is None else {"num_hidden_layers": num_layers})


def random_target(
    bench: Bench, dtype: torch.dtype, layer_ids: Sequence[int], *, num_layers: int | None = None
) -> Target:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = target_config(bench, num_layers=num_layers)
    config = AutoConfig.for_model(**shape, tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return Target(model, layer_ids)


def draft_spec(bench: Bench, config: Mapping[str, Any], layer_ids: Sequence[int]) -> DraftSpec:
    """Of the recipe's draft for a target with this config.json."""
    run = recipe(bench)
    mask_token_id = run.target.mask_token_id
    return DraftSpec.from_target(
        config, run.draft, layer_ids=layer_ids, mask_token_id=mask_token_id
    )


@torch.no_grad()
def random_draft(bench: Bench, target: Target) -> Drafter:
    """A DSpark draft for the target, with its embedding and lm_head, in its dtype."""
    spec = draft_spec(bench, target.text_config.to_dict(), target.layer_ids)
    draft = empty_draft(spec).to_empty(device=bench.device).to(target.dtype)
    for parameter in draft.parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    for name, weight in target.frozen.items():
        draft.get_parameter(name).copy_(weight)
    return draft.eval()
