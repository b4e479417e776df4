"""The target's own checks: each thing that can be wrong is noticed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from deepspec.artifacts.run import Run
from deepspec.target import attention
from deepspec.target.conformance import check_chat, check_target, make_rows, spread
from deepspec.target.model import Target, TargetCache
from tests.conftest import tiny_run

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
SLIDING = ["sliding_attention", "full_attention"] * 2


def tiny_qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True))


def tiny_gemma4() -> Any:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(0)
    config = Gemma4TextConfig(
        **SIZES,
        layer_types=SLIDING,
        sliding_window=16,
        global_head_dim=16,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        final_logit_softcapping=30.0,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
    )
    return Gemma4ForCausalLM(config)


def failing(target: Target) -> list[str]:
    return [check.quantity for check in check_target(target, make_rows(target)) if not check.passed]


def test_a_tap_at_the_wrong_layer_is_noticed() -> None:
    """Trap C1: an index off by one between hooks and hidden states."""
    target = Target(tiny_qwen3(), (-1, 0, 2))
    target.decoder.layers[0].register_forward_hook(
        lambda *_: target._tapped.update({0: target._tapped[-1]})
    )
    assert failing(target) == ["layer taps"]


def test_a_missing_final_norm_is_noticed() -> None:
    """Trap C2."""
    target = Target(tiny_qwen3(), (0, 2))
    target.lm_head = torch.nn.Linear(32, 97, bias=False)
    assert failing(target) == ["final norm and lm_head"]


def test_a_sliding_window_that_the_cache_ignores_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = Target(tiny_gemma4(), (0, 2))
    assert len(make_rows(target)[0]) > target.text_config.sliding_window
    monkeypatch.setattr(TargetCache, "window_mask", lambda _cache, _positions, causal: causal)
    assert failing(target) == ["cached and uncached"]


def test_the_loss_mask_of_the_targets_own_template_is_decoded(demo_store: Path) -> None:
    from deepspec.target.chat import target_folder

    config = tiny_run(demo_store)
    folder = target_folder(Run(config))
    assert folder is not None
    (check,) = check_chat(folder, config.target)
    assert check.passed
    assert "four" in check.note


def test_layers_to_capture_never_include_the_last() -> None:
    assert spread(36) == (-1, 0, 18, 34)
    assert spread(2) == (-1, 0)


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_gemma4])
def test_attention_of_our_own_that_differs_is_noticed(make: Any, monkeypatch) -> None:
    """The comparison is with transformers' attention, not with our own once more."""
    target = Target(make(), (0, 2))
    assert failing(target) == []
    kernel = attention.scaled_dot_product_attention
    monkeypatch.setattr(
        attention,
        "scaled_dot_product_attention",
        lambda *args, scale, **how: kernel(*args, scale=2 * scale, **how),
    )
    assert failing(target) == ["layer taps", "final norm and lm_head"]
