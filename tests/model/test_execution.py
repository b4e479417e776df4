"""Compiled, and computed once more in the backward pass: the same training, however it is run."""

import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepspec.errors import ConfigError
from deepspec.model import execution
from deepspec.model.drafter import Drafter
from deepspec.model.execution import Execution, compiles
from tests.conftest import tiny_run
from tests.model.drafts import CONFIGS, make_batch, make_draft

LENGTHS = [(14, 9), (30,), (5, 61, 8), (40, 41), (12, 13, 14, 15), (100,), (7, 8, 90)]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compile with a backend that needs no C++ compiler; what it returns grows by one with
    every graph.
    """
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        graphs.append(len(graphs))
        return graph.forward

    monkeypatch.setattr(
        execution,
        "compiled",
        lru_cache(lambda function: torch.compile(function, dynamic=True, backend=backend)),
    )
    torch._dynamo.reset()
    return graphs


def gradients(draft: Drafter, lengths: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    batch = make_batch(lengths)
    output = draft.loss(batch, draft.plan(batch))
    parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    return output.numerator.detach(), list(torch.autograd.grad(output.numerator, parameters))


@pytest.mark.parametrize("name", ["gated", "dflash", "eagle3"])
def test_layers_computed_once_more_give_the_same_gradients(name: str) -> None:
    plain, recomputing = make_draft(CONFIGS[name]), make_draft(CONFIGS[name])
    recomputing.execution = Execution(recompute=True)
    (loss, wanted), (other, found) = gradients(plain, (14, 9)), gradients(recomputing, (14, 9))
    assert torch.equal(loss, other)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", ["vanilla", "eagle3"])
def test_a_layer_that_is_computed_once_more_is_not_kept(name: str) -> None:
    def kept(*, recompute: bool) -> int:
        """Bytes that the graph of one loss holds."""
        draft, batch, sizes = make_draft(CONFIGS[name]), make_batch((200, 200)), {}
        draft.execution = Execution(recompute=recompute)

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = draft.loss(batch, draft.plan(batch)).numerator
        assert loss.requires_grad
        return sum(sizes.values())

    assert kept(recompute=True) < 0.5 * kept(recompute=False)


@pytest.mark.parametrize("name", ["vanilla", "eagle3"])
def test_a_compiled_pass_is_the_same_and_is_compiled_once_for_all_lengths(
    name: str, compiled: list[int]
) -> None:
    plain, draft = make_draft(CONFIGS[name]), make_draft(CONFIGS[name])
    draft.execution = Execution(compile=True)
    counts = []
    for lengths in LENGTHS:
        (loss, wanted), (other, found) = gradients(plain, lengths), gradients(draft, lengths)
        torch.testing.assert_close(loss, other)
        for one, two in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        counts.append(len(compiled))
    assert counts[0] > 0
    assert counts[1] == counts[-1]


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch):
    """Nothing was compiled here yet, nor found to be impossible."""
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    execution._compiles.cache_clear()
    torch._dynamo.reset()
    yield
    execution._compiles.cache_clear()
    torch._dynamo.reset()


CPU, GPU = torch.device("cpu"), torch.device("cuda")
ZERO_3 = ("train.strategy=deepspeed", "resources.memory.zero_stage=3")


@pytest.mark.usefixtures("undecided")
def test_auto_leaves_a_cpu_alone_and_warns_once_of_what_a_gpu_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "deepspec")
    run, never = tiny_run(tmp_path), tiny_run(tmp_path, "resources.training.compile=false")
    assert not compiles(run, CPU) and not compiles(never, GPU)
    assert caplog.messages == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not compiles(run, GPU) and not compiles(run, GPU)
    (line,) = caplog.messages
    assert "compile=off device=cuda FALLBACK: a C compiler (gcc) not found. The cost: " in line


@pytest.mark.usefixtures("undecided")
@pytest.mark.parametrize("lacks", ["compiler", "folder"])
def test_what_must_be_compiled_and_cannot_is_refused_before_the_first_step(
    lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first step ended it, with a compiler's stack trace."""
    (tmp_path / "file").touch()
    if lacks == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "folder"))
    with pytest.raises(ConfigError) as caught:
        compiles(tiny_run(tmp_path, "resources.training.compile=true"), CPU)
    assert caught.value.where == "resources.training.compile"
    assert {"compiler": "(g++) not found", "folder": "file/folder"}[lacks] in str(caught.value)


@pytest.mark.usefixtures("undecided")
def test_weights_that_are_fetched_layer_by_layer_are_not_compiled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """The compiled function was given weights of no elements, and raised in the first step."""
    assert not compiles(tiny_run(tmp_path, *ZERO_3), GPU)
    assert "zero_stage 3" in caplog.text
    with pytest.raises(ConfigError, match="needs whole weights"):
        tiny_run(tmp_path, *ZERO_3, "resources.training.compile=true")
