"""Whether the output is the target's own: what the counts can show, and what they cannot."""

from deepspec.artifacts.results import Losslessness
from deepspec.evaluate.counts import Rows

GAP_BOUND = 0.5
"""bfloat16 keeps 8 bits: logits of 16 to 32 differ by steps of 0.125. Rounding may turn a near tie
of a few steps around."""


def losslessness(rows: Rows, temperature: float, dtype: str | None) -> Losslessness:
    """What is known of whether the output is the target's; `ok` is None where these counts cannot
    show it.
    """
    prompts = len(rows)
    identical = sum(bool(row["identical"]) for row in rows)
    gaps = [row["regret"] for row in rows if row.get("regret") is not None]
    largest = max(gaps, default=None)

    differ = f"{prompts - identical} of {prompts} answers differ from plain greedy decoding"
    bound: float | None = GAP_BOUND
    if temperature > 0:
        ok, bound, why = None, None, "which verification ensures; two draws need not be equal"
        words = f"sampled answers are distributed as the target's, {why}"
    elif identical == prompts:
        ok, bound, words = (
            True,
            None,
            "every answer is token for token that of plain greedy decoding",
        )
    elif dtype == "float32":
        ok, bound, words = False, 0.0, f"{differ}: in float32 none may"
    elif largest is None or len(gaps) < prompts - identical:
        ok, words = None, f"{differ}, and how near those ties were was not recorded"
    elif largest > GAP_BOUND:
        ok, words = False, f"{differ}, by more than ties: logit gap {largest:.3g}"
    else:
        why = f"by ties: no emitted token's logit is more than {largest:.3g} below the largest"
        ok, words = True, f"{differ}, {why} (bound {GAP_BOUND:g})"
    return Losslessness(
        dtype=dtype,
        identical=identical,
        prompts=prompts,
        max_logit_gap=largest,
        bound=bound,
        ok=ok,
        words=words,
    )
