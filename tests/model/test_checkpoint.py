"""Drafts on disk and from seeds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepspec.config.data import SamplingConfig
from deepspec.errors import ArtifactMismatch, ConfigError
from deepspec.model import checkpoint
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
        'Missing key(s) in state_dict: "norm.weight"',
        'Unexpected key(s) in state_dict: "extra.weight"',
        "size mismatch for fc.weight: copying a param with shape torch.Size([3, 2])",
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


def storages(tensors: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    return {tensor.untyped_storage()._cdata: tensor for tensor in tensors}


class Made(TorchDispatchMode):
    """Tensors of another device than the host, as they come out of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.tensors += [
            leaf
            for leaf in tree_leaves(out)
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "cpu"
        ]
        return out


@pytest.mark.parametrize("name", CONFIGS)
def test_a_draft_is_cast_before_it_moves(name: str, tmp_path: Path, monkeypatch) -> None:
    """Fault 13: read in float32 to the device and cast there, a draft for Qwen3-8B took 30.6 GB
    to load and 23.2 to run. The device here is `meta`.
    """
    draft = make_draft(CONFIGS[name])
    save_draft(draft, tmp_path)
    empty = checkpoint.empty_draft(draft.spec)
    own = storages(list(empty.state_dict().values()))  # without memory: not to be counted
    monkeypatch.setattr(checkpoint, "empty_draft", lambda _: empty)
    with Made() as made:
        loaded = load_draft(tmp_path, device="meta", dtype=torch.bfloat16)
    moved = [t for key, t in storages(made.tensors).items() if key not in own]
    assert {tensor.dtype for tensor in moved} == {torch.bfloat16}
    whole = sum(tensor.nbytes for tensor in loaded.state_dict().values())
    assert sum(tensor.nbytes for tensor in moved) == whole
    assert 2 * whole == sum(tensor.nbytes for tensor in draft.state_dict().values())


FROZEN = ("embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_target_has_too_is_shared(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    draft = make_draft(CONFIGS[name])
    save_draft(draft, tmp_path)
    of_target = {key: draft.state_dict()[key].to(dtype, copy=True) for key in FROZEN}
    loaded = load_draft(tmp_path, dtype=dtype, shared=of_target).state_dict()
    alone = load_draft(tmp_path, dtype=dtype).state_dict()
    assert {key for key in loaded if loaded[key].data_ptr() in pointers(of_target)} == set(FROZEN)
    assert all(torch.equal(loaded[key], alone[key]) for key in alone)
    assert not any(tensor.requires_grad for tensor in of_target.values())


@pytest.mark.parametrize("differs", ["value", "dtype", "shape"])
def test_what_differs_from_the_targets_is_not_shared(differs: str, tmp_path: Path) -> None:
    """A draft may have learned an embedding of its own."""
    draft = make_draft()
    save_draft(draft, tmp_path)
    of_target = {key: draft.state_dict()[key].clone() for key in FROZEN}
    if differs == "value":
        of_target[FROZEN[0]][-1, -1] += 1
    elif differs == "dtype":
        of_target[FROZEN[0]] = of_target[FROZEN[0]].bfloat16()
    else:
        of_target[FROZEN[0]] = of_target[FROZEN[0]][:-1]
    loaded = load_draft(tmp_path, shared=of_target).state_dict()
    assert loaded[FROZEN[0]].data_ptr() not in pointers(of_target)
    assert torch.equal(loaded[FROZEN[0]], draft.state_dict()[FROZEN[0]])
    assert loaded[FROZEN[1]].data_ptr() in pointers(of_target)


def test_sharing_does_not_hide_a_tensor_that_is_missing(tmp_path: Path) -> None:
    draft = make_draft()
    save_draft(draft, tmp_path)
    of_target = {key: draft.state_dict()[key].clone() for key in FROZEN}
    damage(tmp_path, lm_head__weight=None)
    with pytest.raises(ArtifactMismatch, match=r'Missing .* "lm_head\.weight"'):
        load_draft(tmp_path, shared=of_target)


def pointers(tensors: dict[str, torch.Tensor]) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors.values()}
