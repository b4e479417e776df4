"""Export a draft for a serving engine: written beside its place, read back, compared, and only then
renamed into it.

B batch, T tokens, g block size, m captured layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec.config.data import SamplingConfig
from deepspec.errors import ArtifactMismatch, ConfigError
from deepspec.export.engines import (
    ENGINES,
    SHARED,
    Engine,
    engine_config,
    engine_tensors,
    published_config,
    refuse_unservable,
)
from deepspec.export.model_card import model_card
from deepspec.model.checkpoint import empty_draft, load_tensors, read_spec
from deepspec.model.config_json import spec_from_config
from deepspec.model.drafter import Drafter, Proposal
from deepspec.model.spec import DraftSpec
from deepspec.storage.store import pretty_json

log = logging.getLogger(__name__)

# SGLang's buffer [g], which calibration alone can fill
TEMPERATURES = "confidence_head.sts_temperatures"
NUM_TOKENS = 9  # of the fixed input


def export_draft(draft: Path, *, engine: str, out: Path) -> None:
    """Write `draft` (its folder, or the train artifact that holds it) to `out` as `engine` expects
    it.

    Raises:
        ConfigError: an unknown engine, a folder in use, or a draft that this engine cannot load.
        ArtifactMismatch: no draft there, weights that do not fit, or an export that does not draft
            as the original.
    """
    chosen = next((name for name in ENGINES if name == engine), None)
    if chosen is None:
        raise ConfigError(
            f"there is no engine {engine!r}",
            where="--to",
            fix=f"choose one of: {', '.join(ENGINES)}",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            "the folder to export to exists and is not empty",
            where=str(out),
            fix="name another one, or remove it",
        )
    source = find_draft(draft)
    spec = read_spec(source)
    refuse_unservable(spec, chosen)
    tensors = load_file(source / "model.safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.partial-") as scratch:
        folder = Path(scratch) / out.name
        write_export(folder, spec, tensors, engine=chosen, source=source)
        compare(spec, tensors, folder)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    log.info("exported draft=%s engine=%s out=%s", source, engine, out)


def find_draft(folder: Path) -> Path:
    """The folder with config.json and model.safetensors: this one, or its draft/.

    Raises:
        ArtifactMismatch: neither is.
    """
    for candidate in (folder, folder / "draft"):
        if (candidate / "config.json").is_file() and (candidate / "model.safetensors").is_file():
            return candidate
    fix = "give a folder with config.json and model.safetensors, or a sealed train artifact"
    raise ArtifactMismatch("this folder holds no draft", where=str(folder), fix=fix)


def write_export(
    folder: Path, spec: DraftSpec, tensors: dict[str, Tensor], *, engine: Engine, source: Path
) -> None:
    """Weights, config.json, model card, and the calibration where there is one."""
    folder.mkdir()
    written = engine_tensors(spec, engine, tensors)
    calibration = source / "calibration.json"
    if calibration.is_file():
        shutil.copyfile(calibration, folder / "calibration.json")
        if engine == "sglang" and spec.confidence is not None:
            written[TEMPERATURES] = read_temperatures(calibration, spec.block_size)
    save_file(
        {name: tensor.contiguous() for name, tensor in written.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    dtype = str(tensors["fc.weight"].dtype).removeprefix("torch.")
    (folder / "config.json").write_bytes(pretty_json(engine_config(spec, engine, dtype=dtype)))
    (folder / "README.md").write_text(model_card(spec, engine, source=source), encoding="utf-8")


def read_temperatures(calibration: Path, block_size: int) -> Tensor:
    """The confidence temperatures of each slot [g] float32.

    Raises:
        ArtifactMismatch: not JSON, or not a positive number for each slot.
    """
    content, fix = _read_json(calibration), "calibrate this draft again, or remove the file"
    found = content.get("temperatures") if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise ArtifactMismatch(
            "the file holds no list of temperatures", where=str(calibration), fix=fix
        )
    if len(found) != block_size:
        what = f"the calibration holds {len(found)} temperatures, the draft proposes {block_size} tokens"
        raise ArtifactMismatch(what, where=str(calibration), fix=fix)
    wrong = [
        value
        for value in found
        if not isinstance(value, int | float) or not 0 < value < float("inf")
    ]
    if wrong:
        raise ArtifactMismatch(
            f"a temperature is a number above 0, not {wrong[0]}", where=str(calibration), fix=fix
        )
    return torch.tensor(found, dtype=torch.float32)


def compare(spec: DraftSpec, tensors: dict[str, Tensor], folder: Path) -> None:
    """Read an export as its engine would, and refuse it unless it drafts exactly as the original.

    Raises:
        ArtifactMismatch: naming what differs.
    """
    config = published_config(_read_json(folder / "config.json"))
    exported = load_file(folder / "model.safetensors")
    exported.pop(TEMPERATURES, None)
    reloaded = spec_from_config(config)
    # the target's, as in the engine
    complete = {name: tensors[name] for name in SHARED if name not in exported} | exported
    pair = [_loaded(each, held, folder) for each, held in ((spec, tensors), (reloaded, complete))]
    original, again = (fixed_proposal(draft) for draft in pair)
    same = [
        one is two or (one is not None and two is not None and torch.equal(one, two))
        for one, two in zip(original, again, strict=True)
    ]
    layout = (
        config.get("sample_from_anchor", True) is True
        and config.get("dspark_bonus_anchor", False) is False
    )
    if not all(same) or not layout or reloaded != spec:
        fix = "report this; the export was not written"
        raise ArtifactMismatch(
            "the export, read back, does not draft as the original does", where=str(folder), fix=fix
        )


def _loaded(spec: DraftSpec, tensors: dict[str, Tensor], folder: Path) -> Drafter:
    draft = empty_draft(spec)
    # Copied out of the mapped files: where a tensor lies in its file decides its alignment, and
    # that the last bits of a product.
    load_tensors(
        draft,
        {name: tensor.clone() for name, tensor in tensors.items()},
        dtype=torch.float32,
        where=str(folder),
    )
    return draft.eval()


@torch.inference_mode()
def fixed_proposal(draft: Drafter) -> Proposal:
    """What a draft proposes for a fixed input, its distributions [1, g, V] and confidence [1,
    g] included.
    """
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, NUM_TOKENS, draft.spec.num_context_features, generator=generator)
    tokens = torch.randint(0, draft.spec.vocab_size, (1, NUM_TOKENS), generator=generator)
    cache = draft.new_cache(1, NUM_TOKENS)
    draft.extend(cache, context, tokens, [NUM_TOKENS])
    uniforms = torch.rand(1, draft.block_size, generator=generator)
    return draft.propose(cache, tokens[:, -1], SamplingConfig(temperature=1.0), uniforms)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactMismatch(
            f"the file is not JSON: {error}",
            where=str(path),
            fix="export the draft again from where it was trained",
        ) from None
    return fields
