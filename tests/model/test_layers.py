"""Rotary tables and caches."""

import pytest
import torch

from deepspec.config.families import RopeSettings
from deepspec.errors import DeepSpecError
from deepspec.model.kv_cache import LayerCache
from deepspec.model.layers import RotaryTable, rotate
from tests.model.drafts import CONFIGS, make_draft


@pytest.mark.parametrize("name", ["vanilla", "eagle3"])
def test_frequencies_stay_float32_when_the_draft_is_cast(name: str) -> None:
    """Trap D5: rounded to bfloat16, position 30,000 would turn by another angle altogether."""
    draft = make_draft(CONFIGS[name])
    exact = draft.rotary(30_000, like=draft.fc.weight)
    draft.to(torch.bfloat16)
    cast = draft.rotary(30_000, like=draft.fc.weight)
    assert draft.rotary.inverse_frequencies.dtype == torch.float32
    assert torch.equal(cast.cos, exact.cos.bfloat16())
    assert torch.equal(cast.sin, exact.sin.bfloat16())


def test_rotation_is_that_of_transformers() -> None:
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    table = RotaryTable(RopeSettings(10_000.0, 4), 8)(10, like=torch.empty(0))
    x = torch.randn(2, 10, 3, 8)
    angles = torch.arange(10.0)[:, None] / 10_000.0 ** (torch.arange(0, 8, 2) / 8)
    angles = torch.cat([angles, angles], -1)[None]
    wanted, _ = apply_rotary_pos_emb(
        x.transpose(1, 2), x.transpose(1, 2), angles.cos(), angles.sin()
    )
    torch.testing.assert_close(
        rotate(x, type(table)(table.cos[:10], table.sin[:10])), wanted.transpose(1, 2)
    )


def test_rows_of_a_cache_grow_and_shrink_apart() -> None:
    cache, rows = LayerCache(2, 8), torch.arange(2.0)[:, None, None, None]
    cache.write(
        (rows * 100 + torch.arange(3.0)[None, None, :, None]).expand(2, 1, 3, 2),
        torch.zeros(2, 1, 3, 2),
        [0, 0],
    )
    # row 1 was taken back to one
    keys, _ = cache.write(torch.full((2, 1, 2, 2), 7.0), torch.ones(2, 1, 2, 2), [3, 1])
    assert keys[:, 0, :, 0].tolist() == [[0, 1, 2, 7, 7], [100, 7, 7, 0, 0]]
    keys, values = cache.write(torch.full((2, 1, 1, 2), 9.0), torch.full((2, 1, 1, 2), 9.0), [2, 2])
    assert keys[:, 0, :, 0].tolist() == [[0, 1, 9], [100, 7, 9]]
    assert values.isfinite().all()


def test_a_single_row_is_a_view_of_its_memory() -> None:
    cache = LayerCache(1, 8)
    keys, _ = cache.write(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), [0])
    assert cache.pair is not None
    assert keys.data_ptr() == cache.pair[0].data_ptr()


def test_a_full_cache_says_so() -> None:
    with pytest.raises(DeepSpecError, match="9 positions does not fit a cache of 8"):
        LayerCache(2, 8).write(torch.ones(2, 1, 3, 2), torch.ones(2, 1, 3, 2), [6, 0])
