"""What is found out about a target as it is loaded, on a few tokens: the kernel of its attention,
the factor of its logits, and whether its taps, logits and cache are the model's own.

B rows, T tokens, m captured layers, D hidden size, V vocabulary.
"""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deepspec.errors import ConfigError
from deepspec.target.attention import EAGER, GROUPED, own_attention, set_attention
from deepspec.target.generate import prefill
from deepspec.target.model import Target, TargetOutput

log = logging.getLogger(__name__)

ROWS, TOKENS, NEW = 2, 12, 4
ALLOWED = 0.01, 0.05  # relative error in float32, and in bfloat16
# what models raise that are called in a way that they do not know
UNFIT = (
    AssertionError,
    AttributeError,
    ConfigError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@torch.inference_mode()
def examine(target: Target) -> None:
    """Set the target's kernel and `logit_factor`, and what keeps it from decoding, if anything.

    It takes four passes over 24 tokens, the first one with the model's own attention. Our kernel
    stays where its states are the model's own, with a cache and without; else the model's own
    formula takes its place.

    Raises:
        ConfigError: its layers or logits are not what the model itself computes, with the errors.
    """
    target.logit_factor = 1.0
    length = min(TOKENS, target.max_positions)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(target.text_config.vocab_size, (ROWS, length), generator=generator)
    ids = ids.to(target.device)
    own = _own_pass(target, ids)
    found: dict[str, tuple[str, str]] = {}  # of each kernel: what differs uncached, and cached
    for kernel in [target.kernel] if target.kernel != GROUPED else [GROUPED, EAGER]:
        if kernel == EAGER:
            set_attention(target.decoder, EAGER)
        uncached = _differs(lambda: _uncached(target, ids), own)
        last = TargetOutput(*(part[:, -NEW:] for part in own))
        cached = uncached or (
            "" if target.packs else _differs(lambda: _continued(target, ids), last)
        )
        found[kernel] = uncached, cached
        if not cached:
            break
    right = [kernel for kernel, (uncached, _) in found.items() if not uncached]
    if not right:
        whys = "; ".join(f"with attention {kernel}: {why}" for kernel, (why, _) in found.items())
        raise ConfigError(
            f"the target does not compute what the model computes with its own attention; {whys}",
            where="target.model",
            fix="choose another target",
        )
    if cached and target.kernel != right[0]:
        set_attention(target.decoder, right[0])
    target.cannot_decode = found[right[0]][1] if cached else ""
    if target.cannot_decode:
        log.warning("target decoding=none: %s", target.cannot_decode)


def _own_pass(target: Target, ids: Tensor) -> TargetOutput:
    """The model's own pass over `ids` [B, T], whose taps and logits are compared with it.

    Raises:
        ConfigError: they differ.
    """
    last: list[Tensor] = []
    hook = target.decoder.register_forward_hook(
        lambda _module, _inputs, output: last.append(output.last_hidden_state)
    )
    try:
        with own_attention(target.decoder):
            wanted = target.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    finally:
        hook.remove()
    output = target.taken(last[0])
    states = [wanted.hidden_states[layer + 1].to(target.device) for layer in target.layer_ids]
    logits = wanted.logits.to(target.device)
    target.logit_factor = measured_factor(target, output.last_hidden, logits)
    output = target.taken(last[0], output.context)
    errors = {
        f"layers {list(target.layer_ids)}": relative_error(output.context, torch.cat(states, -1)),
        "logits": relative_error(target.logits(output.last_hidden), logits),
    }
    if wrong := {name: size for name, size in errors.items() if not size <= _allowed(target.dtype)}:
        numbers = ", ".join(f"{name} differ by {size:.1e}" for name, size in wrong.items())
        raise ConfigError(
            f"what is read of the target is not what the model computes: {numbers} (relative;"
            f" {_allowed(target.dtype)} is allowed), with {target.logit_factor:g} as the factor of"
            " its logits",
            where="target.model",
            fix="choose a target whose logits are lm_head of its final hidden state, up to a"
            " factor and a cap",
        )
    return output


def measured_factor(target: Target, last_hidden: Tensor, logits: Tensor) -> float:
    """The number that best makes the model's own `logits` [B, T, V] of `lm_head(last_hidden)`.

    It is 1 where it is so within rounding.
    """
    plain, wanted = target.lm_head(last_hidden).double(), logits.double()
    if target.softcap is not None:
        capped = wanted / target.softcap
        inside = capped.abs() < 0.9  # where the cap leaves something to measure
        plain = plain.where(inside, 0.0)
        wanted = (target.softcap * torch.atanh(capped)).where(inside, 0.0)
    factor = ((plain * wanted).sum() / (plain * plain).sum()).item()
    rounding = 1e-5 if target.dtype == torch.float32 else 1e-2
    if abs(factor - 1) < rounding or not math.isfinite(factor):
        return 1.0
    return float(f"{factor:.6g}")


def _uncached(target: Target, ids: Tensor) -> TargetOutput:
    if not target.packs:
        return target.forward(ids)
    outputs = target.forward_packed(ids.tolist())
    return TargetOutput(*(torch.stack(parts) for parts in zip(*outputs, strict=True)))


def _continued(target: Target, ids: Tensor) -> TargetOutput:
    """States of the last tokens of `ids`, with a cache whose rows had others in their place.

    Rows are prefilled to different lengths, and tokens taken back in each.
    """
    first = ids.shape[1] - NEW
    cache = target.new_cache(len(ids), ids.shape[1] + NEW)
    prefill(target, cache, [row[: first - number] for number, row in enumerate(ids.tolist())])
    target.forward(ids[:, : NEW + 3].flip(0), cache)  # taken back at once: lengths stay
    new = [ids[number, length:] for number, length in enumerate(cache.lengths)]
    output = target.forward(pad_sequence(new, batch_first=True), cache)
    parts = (
        torch.stack([states[number, len(row) - NEW : len(row)] for number, row in enumerate(new)])
        for states in output
    )
    return TargetOutput(*parts)


def _differs(compute: Callable[[], TargetOutput], own: TargetOutput) -> str:
    """What is wrong with it, in words and numbers; empty where nothing is."""
    try:
        output = compute()
    except torch.OutOfMemoryError:
        raise
    except UNFIT as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    allowed = _allowed(own.last_hidden.dtype)
    for name, found, wanted in zip(TargetOutput._fields, output, own, strict=True):
        if not (size := relative_error(found, wanted)) <= allowed:
            return f"{name} differs by {size:.1e} (relative; {allowed} is allowed)"
    return ""


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Relative error of a token's numbers: the median over a row's tokens, the worst of the rows.

    A median, since rounding in bfloat16 sends single tokens to other experts. Infinite where shapes
    differ or a number is not finite.
    """
    if found.shape != wanted.shape or not found.isfinite().all():
        return math.inf
    difference = (found.double() - wanted.double()).norm(dim=-1)
    return (difference / wanted.double().norm(dim=-1)).median(dim=-1).values.max().item()


def _allowed(dtype: torch.dtype) -> float:
    return ALLOWED[dtype != torch.float32]
