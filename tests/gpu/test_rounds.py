"""Decoding on a GPU, as far as it can be seen without one: no tensor of the host among those of
the device, and few waits of the host in a round.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from deepspec.config.data import SamplingConfig
from deepspec.evaluate.conformance import ALGORITHMS
from deepspec.evaluate.scheduler import Policy, Scheduled, Threshold
from deepspec.evaluate.speculate import speculate
from deepspec.evaluate.speed_curve import SpeedCurve
from deepspec.model.checkpoint import build_draft
from deepspec.model.drafter import Drafter
from deepspec.model.kv_cache import SPARE
from deepspec.model.row_cache import RowCache
from deepspec.model.spec import DraftSpec
from deepspec.target.generate import Decode, TargetBatch, generate
from deepspec.target.model import Target
from tests.gpu.tagged import GpuPretence
from tests.target.test_conformance import tiny_gemma4, tiny_qwen3
from tests.target.test_window import WINDOW, some_tokens

# Gemma4's sliding layers keep a window of keys and values: some prompts are longer, some get there
# as they are answered, and one stays within it.
TARGETS = {
    "qwen3": (tiny_qwen3, [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14], [15, 16, 17]]),
    "gemma4": (tiny_gemma4, some_tokens(WINDOW + SPARE + 9, WINDOW - 3, 61, 3, WINDOW)),
}
STOP = frozenset({3})
CURVE = SpeedCurve([1, 8, 32], [100.0, 90.0, 40.0])
# The draft, how blocks are cut, and how often the host may wait in a round. Eagle3 has no
# confidence that a policy could cut by.
WAYS: dict[str, tuple[str, Policy | None, int]] = {
    "full": ("dspark", None, 1),
    "threshold": ("dspark", Threshold(0.5), 2),
    "scheduled": ("dspark", Scheduled(CURVE), 2),
    "eagle3": ("eagle3", None, 1),
}


class Models(NamedTuple):
    name: str
    target: Target
    drafts: dict[str, Drafter]
    prompts: list[list[int]]


def make_models(name: str) -> Models:
    make, prompts = TARGETS[name]
    target = Target(make(), (0, 2))
    drafts = {}
    for algorithm in ("dspark", "eagle3"):
        spec = DraftSpec.from_target(
            target.model.config.to_dict(),
            ALGORITHMS[algorithm],
            layer_ids=target.layer_ids,
            mask_token_id=96,
        )
        embed, lm_head = target.decoder.embed_tokens.weight, target.lm_head.weight
        drafts[algorithm] = build_draft(spec, embed=embed, lm_head=lm_head, seed=0).eval()
    return Models(name, target, drafts, prompts)


@pytest.fixture(scope="module", params=TARGETS)
def on_host(request: pytest.FixtureRequest) -> Models:
    return make_models(request.param)


@pytest.fixture
def gpu() -> Iterator[GpuPretence]:
    with GpuPretence() as entered:
        yield entered


@pytest.fixture(scope="module")
def on_gpu(on_host: Models) -> Models:
    with GpuPretence():
        made = make_models(on_host.name)
        model = made.target.model.to("cuda")
        drafts = {name: draft.to("cuda") for name, draft in made.drafts.items()}
        return made._replace(target=Target(model, (0, 2)), drafts=drafts)


def record_waits(monkeypatch: pytest.MonkeyPatch, name: str, gpu: GpuPretence):
    """The waits between a step of this name and the next, those for graphs that are recorded left
    out, and how many prompts were admitted in between.
    """
    marks: list[tuple[int, int]] = []
    admitted, run, start = [0], RowCache.run, TargetBatch.start

    def marking(self: RowCache, step: str, *args: Any, **how: Any) -> Any:
        if step == name:
            marks.append((gpu.num_waits - gpu.waits["capture"], admitted[0]))
        return run(self, step, *args, **how)

    def admitting(*args: Any) -> Any:
        admitted[0] += 1
        return start(*args)

    monkeypatch.setattr(RowCache, "run", marking)
    monkeypatch.setattr(TargetBatch, "start", admitting)
    return lambda: np.diff(np.array(marks), axis=0)


def decode(temperature: float, batch_size: int) -> Decode:
    return Decode(SamplingConfig(temperature=temperature), 12, STOP, batch_size)


CASES = [(0.0, 1), (0.0, 3), (1.0, 1), (1.0, 3)]


@pytest.mark.parametrize(("temperature", "batch_size"), CASES)
def test_a_plain_token_costs_one_wait(
    gpu: GpuPretence, on_host: Models, on_gpu: Models, monkeypatch, temperature, batch_size
):
    settings = decode(temperature, batch_size)
    prompts, seeds = on_host.prompts[: batch_size + 2], range(batch_size + 2)
    wanted = generate(on_host.target, prompts, settings, seeds=seeds)
    found = record_waits(monkeypatch, "token", gpu)
    assert generate(on_gpu.target, prompts, settings, seeds=seeds) == wanted
    tokens = found()
    assert len(tokens) >= 3
    # New prompts are read once more.
    assert (tokens[:, 0] <= 1 + tokens[:, 1]).all()
    assert set(gpu.waits) <= {"read", "capture"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("temperature", "batch_size"), CASES)
def test_a_round_costs_one_wait_and_another_where_blocks_are_cut(
    gpu: GpuPretence, on_host: Models, on_gpu: Models, monkeypatch, temperature, batch_size, way
):
    """Ten waits at temperature 0 and nineteen at 1, before: clocks that synchronised, four lists
    read one after the other, uniforms and lengths sent one by one.
    """
    algorithm, policy, limit = WAYS[way]
    settings = decode(temperature, batch_size)
    prompts, seeds = on_host.prompts[: batch_size + 2], range(batch_size + 2)
    how: dict[str, Any] = {"seeds": seeds, "policy": policy}
    wanted, _ = speculate(on_host.target, on_host.drafts[algorithm], prompts, settings, **how)
    draft = on_gpu.drafts[algorithm]
    found = record_waits(monkeypatch, "propose", gpu)
    traces, seconds = speculate(on_gpu.target, draft, prompts, settings, **how)
    assert [trace.token_ids for trace in traces] == [trace.token_ids for trace in wanted]
    assert [trace.accepted for trace in traces] == [trace.accepted for trace in wanted]
    rounds = found()
    assert len(rounds) >= 3
    # New prompts are read once more, whose first tokens the draft is given.
    assert (rounds[:, 0] <= limit + rounds[:, 1]).all()
    assert seconds.total > 0 and seconds.draft > 0 and seconds.verify > 0
