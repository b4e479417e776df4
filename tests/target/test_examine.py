"""What is found as a target is loaded: a factor of its logits, a kernel that is right, and what
does not fit, with its numbers.
"""

import pytest
import torch

from deepspec.config.data import SamplingConfig
from deepspec.errors import ConfigError
from deepspec.target import attention, decoding_cache
from deepspec.target import examine as examine_module
from deepspec.target.attention import EAGER, GROUPED
from deepspec.target.examine import examine
from deepspec.target.generate import Decode, generate
from deepspec.target.loading import load_target
from deepspec.target.model import Target
from tests.conftest import tiny_run
from tests.target.tiny_models import CAPTURE_ONLY, make_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "factor", "kernel"),
    [
        ("llama", 1.0, GROUPED),
        ("granite", 1 / 6, GROUPED),
        ("cohere2", 0.0625, GROUPED),
        ("gpt_oss", 1.0, EAGER),
        ("qwen3_vl", 1.0, GROUPED),
    ],
)
def test_a_target_is_loaded_with_its_kernel_and_the_factor_of_its_logits(
    name, factor, kernel, dtype, tmp_path
):
    """A Granite draft learned from logits six times too large."""
    model = make_model(name)
    model.save_pretrained(tmp_path)
    update = {"model": str(tmp_path), "layer_ids": (0, 2), "mask_token_id": 96}
    settings = tiny_run(tmp_path).target.model_copy(update=update)
    target = load_target(settings, folder=tmp_path, device="cpu", dtype=dtype)
    assert target.logit_factor == pytest.approx(factor, rel=1e-5 if dtype == "float32" else 1e-3)
    assert target.kernel == kernel
    if dtype == "float32":
        ids = torch.arange(3, 19)[None]
        found = target.logits(target.forward(ids).last_hidden)
        torch.testing.assert_close(found, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_a_kernel_of_ours_that_is_wrong_gives_way_to_the_models_own(monkeypatch):
    """Whatever makes it wrong: nothing about the model tells here that it is."""
    kernel = attention.scaled_dot_product_attention
    monkeypatch.setattr(
        attention,
        "scaled_dot_product_attention",
        lambda *args, scale, **how: kernel(*args, scale=3 * scale, **how),
    )
    target = Target(make_model("llama"), (0, 2))
    assert target.kernel == GROUPED
    examine(target)
    assert (target.kernel, target.cannot_decode) == (EAGER, "")


def test_logits_that_cannot_be_had_are_refused_with_numbers():
    """Here a bias that only the model's own forward pass adds."""
    model = make_model("llama")
    model.register_forward_hook(
        lambda _module, _inputs, output: setattr(output, "logits", output.logits.roll(1, -1))
    )
    with pytest.raises(ConfigError, match=r"logits differ by \d\.\de[+-]\d+ .* as the factor"):
        examine(Target(model, (0, 2)))


def test_layers_that_are_not_the_models_hidden_states_are_refused_with_numbers():
    target = Target(make_model("llama"), (0, 2))
    target.layers[0].register_forward_hook(
        lambda *_: target._tapped.update({0: 2 * target._tapped[0]})
    )
    with pytest.raises(ConfigError, match=r"layers \[0, 2\] differ by \d\.\de"):
        examine(target)


def test_a_target_that_a_cache_changes_is_captured_and_refused_as_it_decodes(monkeypatch, caplog):
    """A mask that also shows what was taken back."""
    target = Target(make_model("llama"), (0, 2))
    see_all = lambda _cache, *_, **__: attention.KeyMask(  # noqa: E731
        torch.ones_like(_cache._step[1])
    )
    monkeypatch.setattr(decoding_cache.TargetCache, "key_mask", see_all)
    examine(target)
    assert "differs by" in caplog.text
    assert target.forward(torch.arange(5)[None]).context.shape == (1, 5, 64)
    settings = Decode(SamplingConfig(temperature=0), 4, frozenset())
    with pytest.raises(ConfigError, match=r"cannot be decoded with a cache: .*differs by \d\.\de"):
        generate(target, [[5, 6, 7]], settings, seeds=[0])


@pytest.mark.parametrize("name", CAPTURE_ONLY)
def test_a_model_that_our_cache_does_not_serve_is_captured_and_not_decoded(name):
    """Recurrent layers ask the cache for what it does not keep."""
    target = Target(make_model(name), (-1, 0, 2))
    examine(target)
    ids = torch.arange(3, 19)[None]
    wanted = target.model(input_ids=ids, output_hidden_states=True).hidden_states
    found = target.forward(ids).context
    torch.testing.assert_close(found, torch.cat([wanted[0], wanted[1], wanted[3]], -1))
    with pytest.raises(ConfigError, match="cannot be decoded with a cache"):
        target.new_cache(1, 8)


def test_running_out_of_memory_is_not_taken_for_a_target_that_does_not_fit(monkeypatch):
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(examine_module, "_continued", too_large)
    with pytest.raises(torch.OutOfMemoryError):
        examine(Target(make_model("llama"), (0, 2)))
