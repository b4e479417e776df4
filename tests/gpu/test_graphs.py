"""CUDA graphs of decoding, on a pretended GPU: a replay computes what was recorded from what its
tensors hold by then, so that anything a step takes from the host shows as a wrong token.
"""

import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deepspec.config.data import SamplingConfig
from deepspec.errors import DeepSpecError
from deepspec.evaluate.conformance import ALGORITHMS
from deepspec.evaluate.scheduler import Threshold
from deepspec.evaluate.speculate import speculate
from deepspec.model import graphs, row_cache
from deepspec.model.checkpoint import build_draft
from deepspec.model.drafter import Drafter
from deepspec.model.graphs import GraphMemory
from deepspec.model.kv_cache import SPARE
from deepspec.model.row_cache import RowCache, bucket
from deepspec.model.spec import DraftSpec
from deepspec.target.generate import Decode, generate, prefill
from deepspec.target.model import Target
from tests.gpu.tagged import GpuPretence, OnGpu
from tests.target.test_conformance import tiny_gemma4, tiny_qwen3
from tests.target.test_window import WINDOW, sliding_qwen3, some_tokens

TARGETS = {"qwen3": tiny_qwen3, "sliding": sliding_qwen3, "gemma4": tiny_gemma4}
NEW_TOKENS = 12
PROMPTS = some_tokens(6, 38, 3)  # one goes beyond the window and what its slots have room for
assert 38 + NEW_TOKENS > WINDOW + SPARE


def make_target(family: str) -> Target:
    return Target(TARGETS[family](), (0, 2))


def make_draft(target: Target, algorithm: str) -> Drafter:
    spec = DraftSpec.from_target(
        target.model.config.to_dict(),
        ALGORITHMS[algorithm],
        layer_ids=target.layer_ids,
        mask_token_id=96,
    )
    embed, lm_head = target.decoder.embed_tokens.weight, target.lm_head.weight
    return build_draft(spec, embed=embed, lm_head=lm_head, seed=0).eval()


def on_gpu(family: str, algorithm: str) -> tuple[Target, Drafter]:
    target = make_target(family)
    draft = make_draft(target, algorithm)
    return Target(target.model.to("cuda"), (0, 2)), draft.to("cuda")


def decode(temperature: float, batch_size: int) -> Decode:
    return Decode(SamplingConfig(temperature=temperature), NEW_TOKENS, {3, 7}, batch_size)


@pytest.fixture
def gpu() -> Iterator[GpuPretence]:
    with GpuPretence() as entered:
        yield entered


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of a few tokens then need several graphs."""
    monkeypatch.setattr(row_cache, "GROWTH", 16)


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize(
    ("temperature", "batch_size"), [(0.0, 1), pytest.param(1.0, 2, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("family", "algorithm", "cut"),
    [
        ("qwen3", "dspark", False),
        ("qwen3", "dspark", True),
        ("qwen3", "eagle3", False),
        ("sliding", "dspark", False),
        ("gemma4", "dspark", False),
    ],
)
def test_replays_give_the_tokens_of_the_host(
    gpu: GpuPretence, family: str, algorithm: str, cut: bool, batch_size: int, temperature: float
):
    """Once more, with other prompts first, all is replayed: rows that were dropped are there
    again, and what longer prompts left in the caches is not seen.
    """
    host_target = make_target(family)
    host_draft = make_draft(host_target, algorithm)
    settings, seeds = decode(temperature, batch_size), range(len(PROMPTS))
    how: dict[str, Any] = {"seeds": seeds, "policy": Threshold(0.5) if cut else None}
    plain = generate(host_target, PROMPTS, settings, seeds=seeds)
    wanted, _ = speculate(host_target, host_draft, PROMPTS, settings, **how)
    target, draft = on_gpu(family, algorithm)
    for number, order in enumerate((slice(None), slice(None, None, -1))):
        backwards = {**how, "seeds": list(seeds)[order]}
        before = len(gpu.graphs)
        assert generate(target, PROMPTS[order], settings, seeds=list(seeds)[order]) == plain[order]
        traces, _ = speculate(target, draft, PROMPTS[order], settings, **backwards)
        for trace, expected in zip(traces, wanted[order], strict=True):
            assert trace[:4] == expected[:4]
        if number == 0:
            assert len(gpu.graphs) > 3, "several sizes, each recorded"
        elif batch_size == 1 and not cut:
            assert len(gpu.graphs) == before, "nothing is recorded a second time"
    assert sum(graph.num_replays for graph in gpu.graphs) > 2 * len(gpu.graphs)


@pytest.mark.parametrize("algorithm", ["dspark", "eagle3"])
@pytest.mark.parametrize("family", TARGETS)
def test_what_is_recorded_does_not_depend_on_lengths(
    gpu: GpuPretence, monkeypatch: pytest.MonkeyPatch, family: str, algorithm: str
):
    """The same operations on the same shapes for short and long rows, alike or not."""
    target, draft = on_gpu(family, algorithm)
    settings = Decode(SamplingConfig(temperature=1.0), 8, set())
    record = GraphMemory.record
    found: list[dict[str, Any]] = []

    def noting(self: GraphMemory, name: str, step: Any, inputs: Any) -> Any:
        graph = record(self, name, step, inputs)
        if len(inputs[0]) == 2:  # no row has finished
            found[-1][name] = [each.describe() for each in graph.recorded.operations]
        return graph

    monkeypatch.setattr(GraphMemory, "record", noting)
    for prompts in ([[5, 6], [7, 8]], [[5] * 50, [6] * 9], [[5] * 9, [6] * 50]):
        found.append({})
        speculate(target, draft, prompts, settings, seeds=[0, 1])
        generate(target, prompts, settings, seeds=[0, 1])
        target.shelf.release()
    assert found[0].keys() == {"propose", "verify", "extend", "token"}
    assert found[0] == found[1] == found[2]


def addresses(cache: RowCache) -> list[int]:
    pairs = [layer.pair for layer in cache.layers if layer.pair]
    parts = [part for pair in pairs for part in pair]
    assert all(isinstance(part, OnGpu) for part in parts)
    return [part.held.data_ptr() for part in parts]


def test_memory_stays_where_it_is_when_rows_are_dropped_and_come_back(gpu: GpuPretence):
    target, _ = on_gpu("sliding", "dspark")
    with torch.inference_mode():
        with target.shelf.lend(target.new_cache, 3, 100) as cache:
            prefill(target, cache, PROMPTS)
            taken = addresses(cache)
            cache.keep([2])
            assert {len(layer.pair[0]) for layer in cache.layers if layer.pair} == {1}
            assert addresses(cache) == taken
        with target.shelf.lend(target.new_cache, 3, 120) as again:
            assert again is cache, "256 positions were taken"
            assert cache.lengths == [0, 0, 0]
            prefill(target, cache, PROMPTS[::-1])
            assert addresses(cache) == taken
    for rows, capacity in ((2, 100), (2, 300)):
        with target.shelf.lend(target.new_cache, rows, capacity) as other:
            assert other is not cache
    last = weakref.ref(other)
    del other, again, cache
    target.shelf.release()
    assert last() is None, "the memory is free again"


def test_a_round_issues_few_operations(gpu: GpuPretence, monkeypatch: pytest.MonkeyPatch):
    """Launched one by one, a plain token of a real target is 1,833 kernels, a round 2,380."""
    target, draft = on_gpu("qwen3", "dspark")
    settings = Decode(SamplingConfig(temperature=1.0), NEW_TOKENS, set(), 1)
    speculate(target, draft, [[5, 6, 7]], settings, seeds=[0])
    issued: list[int] = []
    run = RowCache.run

    def marking(self: RowCache, name: str, *args: Any, **how: Any) -> Any:
        if name == "propose":
            issued.append(gpu.num_issued)
        return run(self, name, *args, **how)

    monkeypatch.setattr(RowCache, "run", marking)
    speculate(target, draft, [[5, 6, 7]], settings, seeds=[0])
    rounds = torch.tensor(issued).diff()
    assert len(rounds) > 5
    assert rounds.max() <= 50


def test_a_step_that_cannot_be_recorded_is_computed_without_a_graph(
    gpu: GpuPretence, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    host = make_target("qwen3")
    wanted = generate(host, PROMPTS, decode(1.0, 2), seeds=range(3))
    target, _ = on_gpu("qwen3", "dspark")
    forward = target.forward

    def waiting(*args: Any) -> Any:
        output = forward(*args)
        float(output.last_hidden.sum())
        return output

    monkeypatch.setattr(target, "forward", waiting)
    with caplog.at_level(logging.WARNING):
        assert generate(target, PROMPTS, decode(1.0, 2), seeds=range(3)) == wanted
    (record,) = caplog.records
    assert "FALLBACK" in record.message and "capturing: read" in record.message


def test_running_out_of_memory_is_no_reason_to_go_without_graphs(
    gpu: GpuPretence, monkeypatch: pytest.MonkeyPatch
):
    target, _ = on_gpu("qwen3", "dspark")

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(target, "logits", full)
        with pytest.raises(torch.OutOfMemoryError):
            generate(target, PROMPTS, decode(0.0, 2), seeds=range(3))
    generate(target, PROMPTS, decode(0.0, 2), seeds=range(3))
    assert any(graph.num_replays for graph in gpu.graphs)


def test_the_graphs_that_rested_longest_go_first(
    gpu: GpuPretence, small_buckets: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    host = make_target("qwen3")
    wanted = generate(host, PROMPTS, decode(0.0, 1), seeds=range(3))
    target, _ = on_gpu("qwen3", "dspark")
    with target.shelf.lend(target.new_cache, 1, 100) as cache:
        pass
    assert generate(target, PROMPTS, decode(0.0, 1), seeds=range(3)) == wanted
    assert cache.graphs is not None
    assert len(cache.graphs._graphs) == 2 < len(gpu.graphs)


def test_without_graphs_caches_grow_as_on_a_cpu(gpu: GpuPretence):
    target, draft = on_gpu("sliding", "dspark")
    target.shelf.turn_off_graphs()
    speculate(target, draft, PROMPTS, decode(1.0, 2), seeds=range(3))
    assert gpu.graphs == []


def test_what_does_not_fit_a_cache_of_fixed_size_is_refused(gpu: GpuPretence):
    """A window's slots would have to be laid out anew, and a row beyond the end has none."""
    target, _ = on_gpu("sliding", "dspark")
    with torch.inference_mode():
        cache = target.shelf.make(target.new_cache, 1, 3 * WINDOW)
        prefill(target, cache, [[5, 6, 7]])
        for length, num_new in ((3, SPARE + 1), (3 * WINDOW, 1)):
            cache.lengths = [length]
            with pytest.raises(DeepSpecError, match="fixed size"):
                cache.run("token", lambda: (), (), num_new=num_new)


def test_sizes_are_few_and_not_much_too_large():
    sizes = [bucket(length) for length in range(1, 8193)]
    assert len(set(sizes)) == 16
    for length, size in enumerate(sizes, 1):
        assert length <= size <= max(length + 255, 1.25 * length)
