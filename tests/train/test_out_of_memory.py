"""A micro-batch that does not fit is done in parts, with the same result; a sample that does not
names what to lower; any other error passes as it is.
"""

import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepspec.artifacts.run import Run
from deepspec.config.draft import TrainConfig
from deepspec.errors import OutOfMemory
from deepspec.model.block_draft import BlockDraft
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.model.execution import Execution
from deepspec.model.loss import LossOutput
from deepspec.train import step
from deepspec.train.distributed import World
from deepspec.train.loop import run_train
from deepspec.train.out_of_memory import explain_oom, halves
from deepspec.train.strategy import Replicated
from tests.conftest import tiny_run
from tests.model.drafts import CONFIGS, make_batch, make_draft
from tests.train.test_loop import SMOOTH, assert_close, weights

LENGTHS = (5, 9, 11, 14, 16)
SHORT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")


def limit_tokens(draft: Any, most: int, patch: pytest.MonkeyPatch) -> list[int]:
    """The draft's loss runs out of memory over so many tokens; the sizes it was tried with."""
    tried: list[int] = []
    real = draft.loss

    def loss(*args: Any) -> LossOutput:
        tried.append(len(args[-2].input_ids))
        if tried[-1] > most:
            raise torch.OutOfMemoryError(*SHORT.args)
        return real(*args)

    patch.setattr(draft, "loss", loss)
    return tried


def replicated(draft: Drafter) -> Replicated:
    settings = TrainConfig(compute_dtype="float32")
    return Replicated(draft, settings, World(0, 1, torch.device("cpu")))


def gradients(strategy: Replicated) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in strategy.parameters.items()}


def assert_same(first: LossOutput, second: LossOutput) -> None:
    torch.testing.assert_close(first.numerator.detach(), second.numerator.detach())
    torch.testing.assert_close(first.denominator, second.denominator)
    for name in ("numerators", "metrics"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("most", [54, 30, 16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_micro_batch_in_parts_adds_the_gradients_and_sums_of_the_whole(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
):
    whole, split = (replicated(make_draft(CONFIGS[name])) for _ in range(2))
    tried = limit_tokens(split.draft, most, monkeypatch)
    for seed in (1, 2):  # the second one adds to gradients that are there
        batch = make_batch(LENGTHS, seed=seed)
        assert_same(split.backward(batch), whole.backward(batch))
    torch.testing.assert_close(gradients(split), gradients(whole))
    assert (whole.num_splits, split.num_splits) == (0, sum(tokens > most for tokens in tried))
    assert split.num_splits >= 2


def backward_failures(strategy: Replicated) -> Iterator[tuple[nn.Parameter, str]]:
    for parameter in strategy.parameters.values():
        yield parameter, "register_hook"  # before its gradient is added
        yield parameter, "register_post_accumulate_grad_hook"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["rnn", "eagle3"])
def test_memory_that_ends_amid_the_backward_pass_adds_no_gradient_twice(name: str, recompute: bool):
    whole, split = (replicated(make_draft(CONFIGS[name])) for _ in range(2))
    whole.draft.execution = split.draft.execution = Execution(recompute=recompute)
    batch, before = make_batch(LENGTHS, seed=1), make_batch((7,), seed=2)
    whole.backward(before)
    output = whole.backward(batch)
    wanted = gradients(whole)
    for parameter, when in backward_failures(split):
        split.draft.zero_grad()
        split.backward(before)
        failed: list[int] = []

        def fail_twice(_: object, failed: list[int] = failed) -> None:
            failed.append(1)
            if len(failed) < 3:  # the whole, and then its first half
                raise torch.OutOfMemoryError(*SHORT.args)

        hook = getattr(parameter, when)(fail_twice)
        assert_same(split.backward(batch), output)
        hook.remove()
        assert failed
        torch.testing.assert_close(gradients(split), wanted)


def test_what_a_failed_pass_held_is_free_before_its_parts_are_tried(
    monkeypatch: pytest.MonkeyPatch,
):
    strategy = replicated(make_draft())
    real, held = strategy.draft.loss, list[Any]()

    def loss(batch: TrainBatch, plan: Any) -> LossOutput:
        assert all(tensor() is None for tensor in held)
        output = real(batch, plan)
        if len(batch.seeds) > 1:
            # the graph is whole, and memory ends as its backward pass begins
            output.numerator.register_hook(fail)
            held.append(weakref.ref(output.numerator))
        return output

    def fail(_: object) -> None:
        raise torch.OutOfMemoryError(*SHORT.args)

    monkeypatch.setattr(strategy.draft, "loss", loss)
    strategy.backward(make_batch(LENGTHS))
    assert len(held) == strategy.num_splits == len(LENGTHS) - 1


def test_halves_of_a_filled_micro_batch_predict_what_the_whole_does():
    """The fill of a compiled pass follows the last sample."""
    draft, batch = make_draft(), make_batch(LENGTHS)
    fill = 64 - len(batch.input_ids)
    filled = batch._replace(
        input_ids=F.pad(batch.input_ids, (0, fill)),
        loss_mask=F.pad(batch.loss_mask, (0, fill)),
        context=F.pad(batch.context, (0, 0, 0, fill)),
        last_hidden=F.pad(batch.last_hidden, (0, 0, 0, fill)),
    )
    first, second = (draft.loss(half, draft.plan(half)) for half in halves(filled))
    assert_same(first.plus(second), draft.loss(batch, draft.plan(batch)))
    assert [half.seeds for half in halves(filled)] == [(0, 1), (2, 3, 4)]


def test_a_half_without_anything_to_learn_from_adds_nothing(monkeypatch: pytest.MonkeyPatch):
    whole, split = (replicated(make_draft()) for _ in range(2))
    batch = make_batch(LENGTHS)
    batch.loss_mask[: sum(LENGTHS[:2])] = False
    limit_tokens(split.draft, 50, monkeypatch)
    assert_same(split.backward(batch), whole.backward(batch))
    torch.testing.assert_close(gradients(split), gradients(whole))


def test_a_training_short_of_memory_ends_where_any_other_does(
    captured: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    for name in ("plenty", "short"):
        shutil.copytree(captured, tmp_path / name)
    sets = ("train.max_steps=20", *SMOOTH)
    undisturbed = run_train(Run(tiny_run(tmp_path / "plenty", *sets)))
    tried = limit_tokens(BlockDraft, 130, monkeypatch)
    disturbed = run_train(Run(tiny_run(tmp_path / "short", *sets)))
    assert_close(weights(undisturbed), weights(disturbed))
    num_failed = sum(tokens > 130 for tokens in tried)
    for artifact, wanted in ((undisturbed, 0), (disturbed, num_failed)):
        lines = map(json.loads, artifact.read("metrics.jsonl").decode().splitlines())
        assert sum(line.get("micro_batch_splits", 0) for line in lines) == wanted
    assert num_failed >= 20
    assert caplog.text.count("done again in two halves") == 1


def test_a_sample_that_does_not_fit_alone_is_the_error_that_names_the_knobs(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(captured, tmp_path / "store")
    limit_tokens(BlockDraft, 45, monkeypatch)
    config = tiny_run(tmp_path / "store", "resources.checks.preflight=warn")
    with pytest.raises(OutOfMemory, match="a training step does not fit into memory") as caught:
        run_train(Run(config))
    assert "CUDA out of memory. Tried to allocate 20.00 GiB." in caught.value.what


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 9 bytes."
        ),
    ],
)
def test_a_step_that_does_not_fit_names_the_knobs_and_their_values(
    error: Exception, captured: Path, tmp_path: Path, monkeypatch
):
    shutil.copytree(captured, tmp_path / "store")

    def too_large(*_: object) -> None:
        raise error

    monkeypatch.setattr(step, "accumulate", too_large)
    with pytest.raises(OutOfMemory, match="does not fit into memory") as caught:
        run_train(Run(tiny_run(tmp_path / "store", "resources.memory.batch_tokens=4321")))
    assert str(error).splitlines()[0] in caught.value.what
    for knob in (
        "resources.memory.batch_tokens (now 4321)",
        "resources.memory.batch_slots (now 17284)",
        "draft.num_anchors (now 4)",
        "draft.block_size (now 7)",
    ):
        assert knob in caught.value.fix


def test_a_draft_without_anchors_names_what_it_has(tmp_path: Path):
    config = tiny_run(tmp_path, "target.layer_ids=[0, 1, 2]", recipe="eagle3-demo")
    with pytest.raises(OutOfMemory) as caught, explain_oom(config):
        raise RuntimeError("out of memory")
    assert "draft.ttt_length (now 7)" in caught.value.fix
    assert "num_anchors" not in caught.value.fix


def test_any_other_error_passes(tmp_path: Path):
    config = tiny_run(tmp_path)
    with pytest.raises(RuntimeError, match="shapes do not match"), explain_oom(config):
        raise RuntimeError("shapes do not match")


def test_weights_that_do_not_fit_are_an_error_as_well(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before the first step: the draft on its device, and the state of a checkpoint."""
    shutil.copytree(captured, tmp_path / "store")

    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError(*SHORT.args)

    monkeypatch.setattr(BlockDraft, "to", too_large)
    with pytest.raises(OutOfMemory, match="Tried to allocate"):
        run_train(Run(tiny_run(tmp_path / "store")))
