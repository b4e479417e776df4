"""What is measured on this machine: speeds that are positive and of the right order, and
nothing left behind.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen3Config

from deepspec.artifacts.run import Run
from deepspec.config.resources import DevicesConfig
from deepspec.errors import StoreError
from deepspec.plan import measure
from deepspec.plan.measure import draft_parameters, measure_speed, measure_store, num_lanes
from deepspec.plan.parts import Speed
from deepspec.storage.local import LocalStore
from deepspec.storage.urls import open_store
from deepspec.target.loading import read_text_config
from tests.conftest import tiny_run
from tests.model.drafts import GEMMA4

QWEN3 = Qwen3Config(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
)


def speed_of(text: Any, length: int) -> Speed:
    return measure_speed(
        text, dtype=torch.float32, device=torch.device("cpu"), batch_tokens=8192, length=length
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "SECONDS_PER_DEPTH", 0.2)
    monkeypatch.setattr(measure, "STORE_PROBE_BYTES", 1 << 20)


def test_what_a_layer_costs_is_counted_once_for_each_layer(monkeypatch: pytest.MonkeyPatch):
    """A clock that depends on nothing but the layers and tokens of a pass: what a shared
    machine does decides no test.
    """
    monkeypatch.setattr(
        measure, "_seconds", lambda model, ids: 0.25 + 0.001 * len(model.layers) * ids.numel()
    )
    deep = Qwen3Config(**{**QWEN3.to_dict(), "num_hidden_layers": 64, "layer_types": None})
    for text, layers in ((QWEN3, 8), (deep, 64)):
        speed = speed_of(text, 50)
        assert 1 <= speed.num_tokens <= measure.MAX_CPU_TOKENS
        assert speed.tokens_per_s == pytest.approx(
            speed.num_tokens / (0.25 + 0.001 * layers * speed.num_tokens)
        )


def test_a_pass_is_timed_by_running_it():
    speed = speed_of(QWEN3, 50)
    assert speed.tokens_per_s > 0 and speed.flops_per_s > 0


def test_gemma4_is_timed_with_both_kinds_of_its_layers():
    settings = {key: value for key, value in GEMMA4.items() if key != "model_type"}
    text = AutoConfig.for_model(GEMMA4["model_type"], **settings)
    assert speed_of(text, 20).tokens_per_s > 0


def test_weights_are_noise_of_the_runs_dtype_and_finite():
    model = measure._shallow(QWEN3, 3, torch.bfloat16, torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.embed_tokens.weight.shape[0] == measure.SMALL_VOCABULARY
    with torch.inference_mode():
        assert torch.isfinite(model(input_ids=torch.arange(16)[None]).last_hidden_state).all()
    assert QWEN3.num_hidden_layers == 8  # the target's own config is left alone


def test_the_store_is_timed_and_left_as_it_was(tmp_path: Path):
    store = open_store(str(tmp_path))
    store.check_writable()
    before = sorted(tmp_path.iterdir())
    assert (measure_store(store) or 0) > 0
    assert sorted(tmp_path.iterdir()) == before


def test_a_nearly_full_store_is_not_filled_for_a_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(LocalStore, "free_bytes", lambda self: float(measure.STORE_PROBE_BYTES))
    assert measure_store(open_store(str(tmp_path))) is None


def test_a_store_that_fails_to_write_is_an_error_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(LocalStore, "write", fail)
    with pytest.raises(StoreError, match="read-only"):
        measure_store(open_store(str(tmp_path)))


def test_lanes_of_a_cpu_do_not_add_up():
    four = DevicesConfig(lanes=4)
    assert (num_lanes(four, "cpu"), num_lanes(four, "cuda")) == (1, 4)


def test_the_draft_is_counted_without_its_frozen_parts(store: Path):
    from deepspec.target.chat import target_folder

    config = tiny_run(store)
    text = read_text_config(config.target, folder=target_folder(Run(config)))
    whole = draft_parameters(config.target, config.draft, text)
    assert 10_000 < whole < 1_000_000
    smaller = tiny_run(store, "draft.num_layers=1")
    assert draft_parameters(smaller.target, smaller.draft, text) < whole
