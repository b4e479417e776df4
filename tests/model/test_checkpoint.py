"""Drafts on disk and from seeds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspec.config.data import SamplingConfig
from deepspec.errors import ArtifactMismatch, ConfigError
from deepspec.model.checkpoint import build_draft, load_draft, save_draft
from tests.model.drafts import CONFIGS, SIZE, TARGETS, VOCAB, make_draft, make_spec

GREEDY = SamplingConfig(temperature=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_draft_drafts_the_same(name: str, target: str, tmp_path: Path) -> None:
    draft = make_draft(CONFIGS[name], target=target)
    save_draft(draft, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_draft(tmp_path)
    assert loaded.spec == draft.spec
    assert {n for n, p in loaded.named_parameters() if not p.requires_grad} == {
        "embed_tokens.weight",
        "lm_head.weight",
    }
    context, tokens = (
        torch.randn(1, 5, draft.spec.num_context_features),
        torch.tensor([[1, 2, 3, 4, 5]]),
    )
    proposals = []
    for each in (draft, loaded):
        with torch.inference_mode():
            cache = each.new_cache(1, 8)
            each.extend(cache, context, tokens, [5])
            proposals.append(each.propose(cache, tokens[:, -1], GREEDY, None).tokens)
    assert torch.equal(*proposals)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_draft_runs_in_bfloat16(name: str, tmp_path: Path) -> None:
    save_draft(make_draft(CONFIGS[name], target="gemma4"), tmp_path)
    draft = load_draft(tmp_path, dtype=torch.bfloat16)
    cache = draft.new_cache(2, 8)
    draft.extend(
        cache,
        torch.randn(2, 5, draft.spec.num_context_features),
        torch.ones(2, 5, dtype=torch.long),
        [5, 3],
    )
    proposal = draft.propose(
        cache, torch.tensor([3, 4]), SamplingConfig(temperature=1), torch.rand(2, 4)
    )
    assert proposal.probs is not None
    assert proposal.probs.dtype == torch.float32


def test_the_seed_alone_decides_fresh_weights() -> None:
    """Trap D7."""
    same, again, other = make_draft(seed=3), make_draft(seed=3), make_draft(seed=4)
    assert torch.equal(same.fc.weight, again.fc.weight)
    assert not torch.equal(same.fc.weight, other.fc.weight)


def test_frozen_weights_must_have_the_targets_shape() -> None:
    with pytest.raises(ConfigError, match="lm_head"):
        build_draft(
            make_spec(),
            embed=torch.zeros(VOCAB, SIZE),
            lm_head=torch.zeros(VOCAB, SIZE + 1),
            seed=0,
        )


def damage(folder: Path, **changes: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")


def test_one_error_names_every_tensor_that_does_not_fit(tmp_path: Path) -> None:
    save_draft(make_draft(), tmp_path)
    damage(tmp_path, norm__weight=None, extra__weight=torch.zeros(2), fc__weight=torch.zeros(3, 2))
    with pytest.raises(ArtifactMismatch) as caught:
        load_draft(tmp_path)
    for problem in (
        "missing norm.weight",
        "unexpected extra.weight",
        f"fc.weight is [3, 2], not [{SIZE}, {3 * SIZE}]",
    ):
        assert problem in str(caught.value)


def test_a_folder_without_a_draft_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMismatch, match="holds no draft"):
        load_draft(tmp_path)
    save_draft(make_draft(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ConfigError, match="llama"):
        load_draft(tmp_path)
