"""Whether the output is the target's own: what the counts can show, and what they cannot."""

from __future__ import annotations

from typing import Any

from deepspec.evaluate.counts import Rows

REGRET_BOUND = 0.5
"""bfloat16 keeps 8 bits: logits of 16 to 32 are told apart in steps of 0.125. Rounding may turn
a near tie of a few steps around.
"""


def losslessness(rows: Rows, temperature: float, dtype: str | None) -> dict[str, Any]:
    """What is known of whether the output is the target's: of `ok`, None says that these counts
    cannot tell.
    """
    identical, prompts = sum(bool(row["identical"]) for row in rows), len(rows)
    regrets = [row["regret"] for row in rows if row.get("regret") is not None]
    known = {
        "dtype": dtype,
        "identical": identical,
        "prompts": prompts,
        "max_regret": max(regrets, default=None),
    }
    if temperature > 0:
        words = "sampled answers are distributed as the target's, which verification ensures; two draws need not be equal"
        return {**known, "bound": None, "ok": None, "words": words}
    if identical == prompts:
        return {
            **known,
            "bound": None,
            "ok": True,
            "words": "every answer is token for token that of plain greedy decoding",
        }
    differ = f"{prompts - identical} of {prompts} answers differ from plain greedy decoding"
    if dtype == "float32":
        return {**known, "bound": 0.0, "ok": False, "words": f"{differ}: in float32 none may"}
    if len(regrets) < prompts - identical:
        return {
            **known,
            "bound": REGRET_BOUND,
            "ok": None,
            "words": f"{differ}, and how near those ties were was not recorded",
        }
    ok = max(regrets) <= REGRET_BOUND
    words = f"{differ}, by ties: no emitted token's logit is more than {max(regrets):.3g} below the largest (bound {REGRET_BOUND:g})"
    return {
        **known,
        "bound": REGRET_BOUND,
        "ok": ok,
        "words": words if ok else f"{differ}, by more than ties: regret {max(regrets):.3g}",
    }
