"""Loading a target: what does not fit is refused first."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BartConfig, BertConfig, Qwen3ForCausalLM, Qwen3Model, T5Config, ViTConfig

from deepspec.errors import ConfigError, DataError, OutOfMemory
from deepspec.target import loading
from deepspec.target.loading import load_target
from tests.conftest import tiny_run
from tests.target.tiny_target import CONFIG


def test_a_model_that_is_not_there_is_refused_in_one_line(tmp_path):
    settings = tiny_run(tmp_path).target.model_copy(update={"model": str(tmp_path / "none")})
    with pytest.raises(DataError, match="cannot be loaded"):
        load_target(settings, folder=None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_ids": (0, 3)}, r"layers \[3\].*last layer"),
        ({"layer_ids": (0, 7)}, r"layers \[7\] cannot be captured"),
        ({"mask_token_id": 97}, "outside the target's vocabulary"),
    ],
)
def test_settings_that_the_target_does_not_fit_are_refused_before_its_weights_are_read(
    change, reason, tmp_path
):
    CONFIG.save_pretrained(tmp_path)  # a config and no weights at all
    fitting = {"model": str(tmp_path), "layer_ids": (0, 2), "mask_token_id": 96}
    settings = tiny_run(tmp_path).target.model_copy(update={**fitting, **change})
    with pytest.raises(ConfigError, match=reason):
        load_target(settings, folder=tmp_path)


def settings_for(folder):
    return tiny_run(folder).target.model_copy(
        update={"model": str(folder), "layer_ids": (0, 2), "mask_token_id": 96}
    )


@pytest.mark.parametrize("config", [BertConfig(), BartConfig(), T5Config(), ViTConfig()])
def test_what_is_no_causal_language_model_is_refused_before_weights_are_read(config, tmp_path):
    config.num_hidden_layers, config.vocab_size = 4, 97
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"type {config.model_type} is not a causal language"):
        load_target(settings_for(tmp_path), folder=tmp_path)


def test_a_model_without_its_head_is_refused(tmp_path):
    """Its lm_head would be made of random numbers, and the answers nothing."""
    untied = CONFIG.__class__(**CONFIG.to_dict() | {"tie_word_embeddings": False})
    Qwen3Model(untied).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"1 weights of Qwen3ForCausalLM are missing: lm_head"):
        load_target(settings_for(tmp_path), folder=tmp_path)


class HostBytes(TorchDispatchMode):
    """The most bytes of host memory that tensors held at a time; a mapped file is not held."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if storage.filename is None and key not in self.live:
            self.live[key] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, key, None)
            self.peak = max(self.peak, sum(self.live.values()))


def test_weights_that_do_not_fit_are_named(tmp_path, monkeypatch):
    def too_large(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    Qwen3ForCausalLM(CONFIG).save_pretrained(tmp_path / "target")
    monkeypatch.setattr(Qwen3ForCausalLM, "from_pretrained", too_large)
    with pytest.raises(OutOfMemory, match=r"the target does not fit.*Tried to allocate") as caught:
        load_target(tiny_run(tmp_path).target, folder=tmp_path / "target", device="cpu")
    assert "resources.devices.gpus_per_lane" in caught.value.fix


def test_a_target_goes_to_its_device_tensor_by_tensor(tmp_path, monkeypatch):
    """Fault 12: it was built in host memory and then moved; eight lanes with a target of 30 GB each
    took 240 GB of it. Cast on the way, so that the copy on the host is real.
    """
    model = Qwen3ForCausalLM(CONFIG)
    model.save_pretrained(tmp_path)
    settings = settings_for(tmp_path)
    monkeypatch.setattr(loading, "examine", lambda _: None)  # which computes, as meta cannot
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the count sees this thread alone
    held = []
    for device in ("meta", "cpu"):
        monkeypatch.setattr(
            loading, "choose_device", lambda *_, device=device, **__: torch.device(device)
        )
        with HostBytes() as host:
            target = load_target(settings, folder=tmp_path, dtype="bfloat16")
        assert {tensor.device.type for tensor in target.model.parameters()} == {device}
        held.append(host.peak)
    largest = max(tensor.numel() for tensor in model.parameters())
    whole = sum(tensor.numel() for tensor in model.parameters())
    assert held[0] <= 2 * 2 * largest  # bytes of bfloat16, of one tensor and what else is small
    assert held[1] >= 2 * whole  # and the count would have seen all of it
