"""From a target's config to the spec of a draft; what is refused, and why."""

from typing import Any

import pytest

from deepspec.errors import ConfigError
from deepspec.model.spec import DraftSpec
from tests.model.drafts import CONFIGS, QWEN3, VOCAB


@pytest.mark.parametrize(
    ("layer_ids", "reason"),
    [
        ([0, 4], "last one"),
        ([0, 9], "has no layers"),
        ([2, 1], "not ascending"),
        ([1, 1], "not ascending"),
        ([-2], "has no layers"),
        ([], "not"),
    ],
)
def test_layers_that_cannot_be_captured_are_refused(layer_ids: list[int], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        DraftSpec.from_target(QWEN3, CONFIGS["dflash"], layer_ids=layer_ids, mask_token_id=0)


def test_eagle3_cannot_read_the_embedding_output() -> None:
    with pytest.raises(ConfigError, match="eagle3 cannot read"):
        DraftSpec.from_target(QWEN3, CONFIGS["eagle3"], layer_ids=[-1, 0, 1])


@pytest.mark.parametrize(
    ("mask_token_id", "reason"), [(VOCAB, "outside"), (-1, "outside"), (None, "needs a mask token")]
)
def test_a_mask_token_outside_the_vocabulary_is_refused(mask_token_id: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        DraftSpec.from_target(QWEN3, CONFIGS["dflash"], layer_ids=[0], mask_token_id=mask_token_id)
