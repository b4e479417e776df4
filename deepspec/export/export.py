"""Export a draft for a serving engine: written next to its place, read back, compared, then moved.

B batch, T tokens, g block size, m captured layers, D hidden size, V vocabulary.
"""

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec.artifacts.records import Stored
from deepspec.config.data import SamplingConfig
from deepspec.errors import ArtifactMismatch, ConfigError
from deepspec.export.engines import ServingEngine, chosen_engine
from deepspec.export.model_card import model_card
from deepspec.export.source import DraftSource, find_draft, with_target
from deepspec.model.checkpoint import FROZEN, empty_draft, load_tensors, read_spec
from deepspec.model.config_json import layout_keys, spec_from_config
from deepspec.model.spec import DraftSpec
from deepspec.storage.store import pretty_json

log = logging.getLogger(__name__)

CALIBRATION = "calibration.json"
NUM_TOKENS = 9  # of the fixed input
FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class SlotTemperatures(Stored):
    """What an export reads of `calibration.json`: a positive number for each slot [g]."""

    temperatures: list[Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]]


def export_draft(draft: Path | str, *, engine: str, out: Path) -> None:
    """Write `draft` (its folder, or the train artifact that holds it) to `out` for `engine`.

    Tensors are written in the number format of the target, if it is known.

    Raises:
        ConfigError: an unknown engine, a folder in use, or a draft that this engine cannot load.
        ArtifactMismatch: no draft there, weights that do not fit, or an export that does not draft
            as the original.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            "the folder to export to exists and is not empty",
            where=str(out),
            fix="name another one, or remove it",
        )
    source = find_draft(draft)
    spec = with_target(read_spec(source.folder), source.artifact)
    chosen = chosen_engine(engine, spec)
    tensors = load_file(source.folder / "model.safetensors")
    if missing := [name for name in FROZEN if name not in tensors]:
        raise ArtifactMismatch(
            f"this draft takes {' and '.join(missing)} from its target, without which no export can"
            " be compared with it",
            where=str(source.folder),
            fix="engines take a released DFlash draft as it is; or make a whole one of it: "
            "train.start_from with train.max_steps 0",
        )
    if dtype := FORMATS.get(str(spec.text_config.get("target_dtype"))):
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.partial-") as scratch:
        folder = Path(scratch) / out.name
        write_export(folder, spec, tensors, engine=chosen, source=source)
        check_export(folder, spec, tensors, engine=chosen)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    log.info("exported draft=%s engine=%s out=%s", source.folder, engine, out)


def write_export(
    folder: Path,
    spec: DraftSpec,
    tensors: dict[str, Tensor],
    *,
    engine: ServingEngine,
    source: DraftSource,
) -> None:
    """Weights, config.json, model card, and the calibration where there is one, for all to read."""
    folder.mkdir()
    served, dtype = engine.served(spec), tensors["fc.weight"].dtype
    left_out = FROZEN if engine.leaves_out_frozen(served) else ()
    written = {name: tensors[name].contiguous() for name in tensors if name not in left_out}
    if served.markov and not spec.markov:
        for name in ("markov_w1", "markov_w2"):
            shape = spec.vocab_size, served.markov.rank
            written[f"markov_head.{name}.weight"] = torch.zeros(shape, dtype=dtype)
    calibration = source.folder / CALIBRATION
    is_calibrated = calibration.is_file()
    if is_calibrated:
        shutil.copyfile(calibration, folder / CALIBRATION)
        if engine.reads_temperatures and spec.confidence is not None:
            read_temperatures(calibration, spec.block_size)
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    config = engine.write(served, str(dtype).removeprefix("torch."))
    (folder / "config.json").write_bytes(pretty_json(config))
    serving = engine.serving(spec, CALIBRATION if is_calibrated else None)
    card = model_card(spec, engine, serving=serving, artifact=source.artifact)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for path in (folder, *folder.iterdir()):  # what wrote them keeps some to their owner
        path.chmod(0o755 if path.is_dir() else 0o644)


def read_temperatures(calibration: Path, block_size: int) -> Tensor:
    """The confidence temperatures of each slot [g] float32.

    Raises:
        ArtifactMismatch: not a positive number for each slot, or no calibration at all.
    """
    try:
        found = SlotTemperatures.model_validate_json(calibration.read_bytes()).temperatures
        if len(found) == block_size:
            return torch.tensor(found, dtype=torch.float32)
        what = f"the calibration holds {len(found)} temperatures, a block has {block_size} tokens"
    except ValidationError as error:
        first, *_ = error.errors()
        what = f"the file is no calibration: {first['msg']} {first['loc']}"
    fix = "calibrate this draft again, or remove the file"
    raise ArtifactMismatch(what, where=str(calibration), fix=fix)


def check_export(
    folder: Path, spec: DraftSpec, tensors: dict[str, Tensor], *, engine: ServingEngine
) -> None:
    """Read an export as its engine would, and refuse it unless it drafts exactly as the original.

    Raises:
        ArtifactMismatch: it does not.
    """
    config = engine.read(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    exported, reloaded = load_file(folder / "model.safetensors"), spec_from_config(config)
    if engine.leaves_out_frozen(spec):
        exported |= {name: tensors[name] for name in FROZEN}  # the target's, as there
    original = fixed_proposal(spec, tensors, where=str(folder))
    again = fixed_proposal(reloaded, exported, where=str(folder))
    wanted = layout_keys(spec.layout)
    laid_out = all(config.get(key, value) is value for key, value in wanted.items())
    if not torch.equal(original, again) or not laid_out or reloaded != engine.served(spec):
        raise ArtifactMismatch(
            "the export, read back, does not draft as the original does",
            where=str(folder),
            fix="report this; the export was not written",
        )


@torch.inference_mode()
def fixed_proposal(spec: DraftSpec, tensors: dict[str, Tensor], *, where: str) -> Tensor:
    """What a draft proposes for a fixed input: tokens, distributions and confidence, flat float64.

    Raises:
        ArtifactMismatch: the tensors are not those of the draft.
    """
    draft = empty_draft(spec)
    # Copied out of the mapped files: where a tensor lies in its file decides its alignment, and
    # that the last bits of a product.
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    load_tensors(draft.eval(), copies, dtype=torch.float32, where=where)
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, NUM_TOKENS, spec.num_context_features, generator=generator)
    tokens = torch.randint(0, spec.vocab_size, (1, NUM_TOKENS), generator=generator)
    cache = draft.new_cache(1, NUM_TOKENS)
    draft.extend(cache, context, tokens, [NUM_TOKENS])
    uniforms = torch.rand(1, draft.block_size, generator=generator)
    proposal = draft.propose(cache, tokens[:, -1], SamplingConfig(temperature=1.0), uniforms)
    return torch.cat([part.double().flatten() for part in proposal if part is not None])
