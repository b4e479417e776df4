"""Drafts on disk (config.json and model.safetensors in the published form), and fresh drafts."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deepspec.errors import ArtifactMismatch, ConfigError
from deepspec.model.block_draft import BlockDraft
from deepspec.model.config_json import config_from_spec, leaves_frozen_to_target, spec_from_config
from deepspec.model.drafter import Drafter
from deepspec.model.eagle3 import Eagle3Draft
from deepspec.model.layers import RMSNorm
from deepspec.model.spec import DraftSpec

log = logging.getLogger(__name__)

COMPARED_ROWS = 4096  # of two embeddings, at a time
MASK_EMBEDDING = "mask_embedding.pt"  # of some released DFlash drafts
FROZEN = ("embed_tokens.weight", "lm_head.weight")  # the target's own


def empty_draft(spec: DraftSpec) -> Drafter:
    """A draft whose tensors have shapes but no memory yet."""
    with torch.device("meta"):
        return Eagle3Draft(spec) if spec.algorithm == "eagle3" else BlockDraft(spec)


def build_draft(spec: DraftSpec, *, embed: Tensor, lm_head: Tensor, seed: int) -> Drafter:
    """A fresh float32 draft: weights that follow from `seed`, embedding and lm_head [V, D] copied.

    Raises:
        ConfigError: embedding or lm_head is not of the target's shape.
    """
    shape = (spec.vocab_size, spec.hidden_size)
    for name, tensor in (("embedding", embed), ("lm_head", lm_head)):
        if tuple(tensor.shape) != shape:
            what = f"the {name} is {list(tensor.shape)}, the target's config says {list(shape)}"
            raise ConfigError(
                what,
                where="target",
                fix="give the tensors of the target that the config belongs to",
            )
    draft = empty_draft(spec).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in draft.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, spec.initializer_range, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            for buffer in module.buffers(recurse=False):  # Gemma's layer_scalar
                buffer.fill_(1.0)
        draft.embed_tokens.weight.copy_(embed)
        draft.lm_head.weight.copy_(lm_head)
    return draft


def save_draft(draft: Drafter, folder: Path) -> None:
    """Write the weights, then config.json: a folder with a config is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = draft.fc.weight.dtype  # of all of them: training may hold some in another one
    tensors = {
        name: tensor.detach().cpu().to(dtype).contiguous()
        for name, tensor in draft.state_dict().items()
    }
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")
    partial = folder / "config.json.partial"
    partial.write_text(
        json.dumps(
            config_from_spec(draft.spec) | {"dtype": str(dtype).removeprefix("torch.")},
            indent=2,
            sort_keys=True,
        )
        + "\n"
    )
    partial.replace(folder / "config.json")


def load_draft(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    shared: Mapping[str, Tensor] | None = None,
) -> Drafter:
    """The draft in `folder`, every tensor accounted for, in evaluation mode.

    Tensors are read on the host and cast there, so that the device holds none in the file's format.

    Args:
        folder: With config.json and model.safetensors.
        device: Where the draft will be.
        dtype: Number format of its weights.
        shared: By name, tensors of the target [V, D] that take the place of the draft's own where
            their values are the same in `dtype`, without taking memory again; and of those that
            the form of released DFlash drafts leaves to the target.

    Raises:
        ArtifactMismatch: not a draft's folder, or tensors that are missing, extra or of another
            shape (all named).
        ConfigError: a config that describes no draft known here.
    """
    spec, weights, given = read_spec(Path(folder)), Path(folder) / "model.safetensors", shared or {}
    draft, tensors = empty_draft(spec), load_file(weights)
    if leaves_frozen_to_target(spec.text_config):
        tensors = _of_target(given, where=str(weights)) | tensors
    _assign(draft, tensors, where=str(weights))  # refused before anything is on the device
    reused = [name for name, tensor in given.items() if _same(tensors[name], tensor, dtype)]
    log.info("draft=%s device=%s dtype=%s shared=%s", folder, device, dtype, reused)
    placed = {
        name: given[name].detach() if name in reused else tensor.to(dtype).to(device)
        for name, tensor in tensors.items()
    }
    _assign(draft, placed, where=str(weights))
    return draft.eval()


def _of_target(shared: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Embedding and lm_head, for a draft that has none."""
    if missing := [name for name in FROZEN if name not in shared]:
        raise ArtifactMismatch(
            f"this draft takes {' and '.join(missing)} from its target",
            where=where,
            fix="give those of the target as `shared`",
        )
    return {name: shared[name] for name in FROZEN}


def _same(stored: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether another tensor, on any device, holds these values as they are in `dtype`."""
    if (other.dtype, other.shape) != (dtype, stored.shape):
        return False
    parts = zip(stored.split(COMPARED_ROWS), other.split(COMPARED_ROWS), strict=True)
    return all(torch.equal(mine.to(dtype).to(theirs.device), theirs) for mine, theirs in parts)


def read_spec(folder: Path) -> DraftSpec:
    """What the config.json of a draft's folder describes; no weight is read.

    Raises:
        ArtifactMismatch: not a draft's folder.
        ConfigError: a config that describes no draft known here.
    """
    config = folder / "config.json"
    if not (config.is_file() and (folder / "model.safetensors").is_file()):
        fix = "give a folder with config.json and model.safetensors"
        raise ArtifactMismatch("this folder holds no draft", where=str(folder), fix=fix)
    if (folder / MASK_EMBEDDING).exists():
        raise ConfigError(
            "this draft's mask token has an embedding of its own, in a file that is not read here",
            where=str(folder / MASK_EMBEDDING),
            fix="choose a draft whose mask token is in the target's vocabulary",
        )
    return spec_from_config(json.loads(config.read_text(encoding="utf-8")))


def load_tensors(
    draft: nn.Module, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, where: str
) -> None:
    """Give the draft these tensors, cast to `dtype`.

    Raises:
        ArtifactMismatch: one that names all tensors that are missing, extra or of another shape.
    """
    _assign(draft, {name: tensor.to(dtype) for name, tensor in tensors.items()}, where=where)


def _assign(draft: nn.Module, tensors: dict[str, Tensor], *, where: str) -> None:
    try:
        draft.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:  # PyTorch's text names every tensor and both its shapes
        fix = "give the config.json that was saved with these weights"
        what = f"weights and config do not fit: {' '.join(str(error).split())}"
        raise ArtifactMismatch(what, where=where, fix=fix) from error
    # assigning brings the tensors' own flags along
    for name, parameter in draft.named_parameters():
        parameter.requires_grad = not name.startswith(("embed_tokens.", "lm_head."))
