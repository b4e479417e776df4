"""Made rows of a result whose confidences are known to be too sharp or too blunt, by a known
temperature per slot.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def made_rows(
    prompts: int, rounds: int, *, temperatures: Sequence[float], seed: int = 0
) -> list[dict[str, Any]]:
    """As many prompts of so many rounds; a confidence is right once its logit is divided by its
    slot's temperature.
    """
    rng, block_size = np.random.default_rng(seed), len(temperatures)
    rows = []
    for prompt in range(prompts):
        logits = rng.normal(0.8, 1.2, (rounds, block_size))
        chance = 1 / (1 + np.exp(-logits))
        accepted = np.cumprod(rng.random((rounds, block_size)) < chance, axis=1).sum(1).tolist()
        told = 1 / (1 + np.exp(-logits * np.asarray(temperatures)))
        rows.append(
            {
                "benchmark": "made",
                "temperature": 1.0,
                "batch_size": 1,
                "prompt": prompt,
                "proposed": [block_size] * rounds,
                "accepted": accepted,
                "committed": [kept + 1 for kept in accepted],
                "confidence": told.tolist(),
            }
        )
    return rows
