"""Drafts in the form of released DFlash ones (z-lab), which leave embedding and lm_head to the
target.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec.errors import ArtifactMismatch, ConfigError
from deepspec.model.checkpoint import FROZEN, load_draft, save_draft
from deepspec.model.config_json import config_from_spec, spec_from_config
from tests.model.drafts import CONTEXT, QWEN3, VOCAB, make_draft, make_spec

# As z-lab/Qwen3-8B-DFlash-b16 has them, but for the sizes.
RELEASED: dict[str, Any] = {
    **QWEN3,
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "block_size": 5,
    "dflash_config": {"mask_token_id": VOCAB - 1, "target_layer_ids": [-1, 1, 2]},
    "dtype": "float32",
    "layer_types": ["full_attention"] * 2,
    "num_hidden_layers": 2,
    "num_target_layers": 5,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
NAMES = {
    "fc.weight",
    "hidden_norm.weight",
    "norm.weight",
    *(
        f"layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            *(f"self_attn.{part}" for part in ("q_norm", "k_norm")),
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
    ),
}


def released(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """A folder as one downloads it; returns the target's tensors."""
    save_draft(make_draft(CONTEXT), folder)
    tensors = load_file(folder / "model.safetensors")
    of_target = {name: tensors.pop(name) for name in FROZEN}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(RELEASED | changes))
    return of_target


def test_a_released_draft_loads_beside_its_target(tmp_path: Path) -> None:
    of_target = released(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == NAMES
    draft, original = load_draft(tmp_path, shared=of_target), make_draft(CONTEXT)
    assert (draft.spec.layout, draft.block_size, draft.num_queries) == ("anchor_is_context", 4, 5)
    state = draft.state_dict()
    assert all(torch.equal(state[key], value) for key, value in original.state_dict().items())
    assert {name for name in FROZEN if state[name].data_ptr() == of_target[name].data_ptr()} == set(
        FROZEN
    )
    assert not any(tensor.requires_grad for tensor in of_target.values())
    halved = load_draft(tmp_path, shared=of_target, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in halved.state_dict().values()} == {torch.bfloat16}


def test_newer_ones_have_their_sizes_in_dflash_config(tmp_path: Path) -> None:
    inner = {**RELEASED["dflash_config"], "block_size": 5, "num_target_layers": 5}
    of_target = released(
        tmp_path, block_size=None, num_target_layers=None, dflash_config=inner, auto_map=None
    )
    spec = load_draft(tmp_path, shared=of_target).spec
    assert replace(spec, num_anchors=CONTEXT.num_anchors) == make_spec(CONTEXT)


def test_saved_here_it_has_all_tensors_and_says_its_layout(tmp_path: Path) -> None:
    of_target = released(tmp_path / "released")
    save_draft(load_draft(tmp_path / "released", shared=of_target), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not {"dflash_config", "auto_map"} & set(config)
    assert (config["block_size"], config["sample_from_anchor"], config["dspark_bonus_anchor"]) == (
        4,
        False,
        True,
    )
    again = load_draft(tmp_path / "saved")
    assert again.spec == load_draft(tmp_path / "released", shared=of_target).spec
    assert torch.equal(again.embed_tokens.weight, of_target[FROZEN[0]])


def test_without_its_target_it_is_refused_and_so_is_a_tensor_that_is_missing(
    tmp_path: Path,
) -> None:
    of_target = released(tmp_path)
    with pytest.raises(ArtifactMismatch, match=r"takes embed_tokens\.weight and lm_head\.weight"):
        load_draft(tmp_path)
    with pytest.raises(ArtifactMismatch, match=r"takes lm_head\.weight from"):
        load_draft(tmp_path, shared={FROZEN[0]: of_target[FROZEN[0]]})
    with pytest.raises(ArtifactMismatch, match="size mismatch for embed_tokens"):
        load_draft(tmp_path, shared={**of_target, FROZEN[0]: torch.zeros(3, 32)})
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactMismatch, match=r'Missing .* "norm\.weight"'):
        load_draft(tmp_path, shared=of_target)


def inside(**changes: Any) -> dict[str, Any]:
    return {"dflash_config": {**RELEASED["dflash_config"], **changes}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layers of sliding_attention"),
        ({"is_causal": True}, "causal attention within a block"),
        (inside(causal=True), "not computed here: causal"),
        (inside(use_swa=True, swa_window_size=9), "not computed here: swa_window_size, use_swa"),
        (inside(selector_rank=8, conv_kernel_size=3), "conv_kernel_size, selector_rank"),
        (inside(projector_type="domino"), "projector_type"),
        ({"draft_vocab_size": 8}, r"a draft_vocab_size of its own \(8\)"),
        ({"target_hidden_size": 8}, r"a target_hidden_size of its own \(8\)"),
        ({"attention_bias": True}, "attention biases"),
        ({"block_size": 1}, "propose 0 tokens"),
        ({"dflash_config": None}, "target_layer_ids, mask_token_id missing"),
        (inside(sample_from_anchor=True) | {"dspark_bonus_anchor": True}, "different layouts"),
    ],
)
def test_parts_that_drafts_here_do_not_have_are_refused(
    change: dict[str, Any], reason: str
) -> None:
    """Each would load, and draft nonsense."""
    with pytest.raises(ConfigError, match=reason):
        spec_from_config(RELEASED | change)


def test_an_embedding_of_the_mask_token_alone_is_refused(tmp_path: Path) -> None:
    of_target = released(tmp_path)
    (tmp_path / "mask_embedding.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="an embedding of its own"):
        load_draft(tmp_path, shared=of_target)


def test_an_engines_keys_decide_the_layout_of_the_same_form() -> None:
    """As exported before there was a choice: the anchor predicts, and nothing is taken off."""
    spec = spec_from_config(
        RELEASED | inside(sample_from_anchor=True, query_zero_predicts_next=True)
    )
    assert (spec.layout, spec.block_size) == ("anchor_predicts", 5)
    published = {**config_from_spec(make_spec(CONTEXT)), "sample_from_anchor": None}
    assert spec_from_config(published).layout == "anchor_is_context"
    del published["dspark_bonus_anchor"], published["sample_from_anchor"]
    assert spec_from_config(published).layout == "anchor_predicts"
