"""How a draft is served with each engine: the commands of its model card, run in its folder.

They take the draft, and the name of its calibration's file, or None.
"""

import json
import shlex
from typing import Any

from deepspec.export.formats import is_engines_dflash
from deepspec.export.source import target_name
from deepspec.model.spec import DraftSpec

UNNAMED = "TARGET"
# Without it vLLM drafts the likeliest token, and takes it to be certain, at every temperature.
SAMPLED = {"draft_sample_method": "probabilistic"}
ABOVE_0 = "For answers at temperatures above 0 (on a GPU; the distributions take memory there):"
BY_CONFIDENCE = "With blocks cut by the draft's calibrated confidence:"
ZERO_HEAD = (
    "The draft is DFlash, written as DSpark with a Markov head of zeros, which adds nothing to its"
    " logits: engines know by the name of DFlash a block in which the anchor predicts nothing."
)


def vllm_settings(spec: DraftSpec, folder: str) -> dict[str, Any]:
    """What vLLM's `--speculative-config` is for the draft that was exported to this folder."""
    known_as = spec.algorithm == "eagle3" or is_engines_dflash(spec)
    method = spec.algorithm if known_as else "dspark"
    return {"method": method, "model": folder, "num_speculative_tokens": spec.block_size}


def with_vllm(spec: DraftSpec, calibration: str | None) -> str:
    """For `--to vllm`."""
    settings = vllm_settings(spec, ".")
    serve = ["vllm", "serve", target_name(spec) or UNNAMED]
    return _page(spec, _vllm(serve, settings), ABOVE_0, _vllm(serve, settings | SAMPLED))


def with_speculators(spec: DraftSpec, calibration: str | None) -> str:
    """For `--to speculators`: vLLM reads the target and the method in the folder's config."""
    if not target_name(spec):
        return with_vllm(spec, calibration)
    serve = ["vllm", "serve", "."]
    return _page(spec, _command(serve), ABOVE_0, _vllm(serve, SAMPLED))


def with_sglang(spec: DraftSpec, calibration: str | None) -> str:
    """For `--to sglang`, which draws DSpark's drafts at the temperature of the answer by itself."""
    serve = ["python", "-m", "sglang.launch_server", "--model-path", target_name(spec) or UNNAMED]
    method = "DFLASH" if is_engines_dflash(spec) else "DSPARK"
    serve += ["--speculative-algorithm", method, "--speculative-draft-model-path", "."]
    if calibration is None or spec.confidence is None:
        return _page(spec, _command(serve))
    cut = ["env", "SGLANG_RAGGED_VERIFY_MODE=compact", *serve]
    cut += ["--speculative-dspark-confidence-sts-path", calibration]
    return _page(spec, _command(serve), BY_CONFIDENCE, _command(cut))


def with_deepspec(spec: DraftSpec, calibration: str | None) -> str:
    """For `--to hf`."""
    return "Load it with `deepspec.model.checkpoint.load_draft`."


def _vllm(serve: list[str], settings: dict[str, Any]) -> str:
    return _command([*serve, "--speculative-config", json.dumps(settings)])


def _command(words: list[str]) -> str:
    return f"```sh\n{shlex.join(words)}\n```"


def _page(spec: DraftSpec, *parts: str) -> str:
    where = "" if target_name(spec) else f", with the target (not named in the draft) for {UNNAMED}"
    has_zeros = spec.algorithm == "dflash" and not is_engines_dflash(spec)
    note = (ZERO_HEAD,) if has_zeros else ()
    return "\n\n".join((f"In this folder{where}:", *parts, *note))
