"""The chunked loss is the plain formula: its sum, its terms and its gradients, in any chunks,
and without the logits.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepspec.model import chunked_loss, execution
from deepspec.model.chunked_loss import Coefficients, Vocabulary, score
from deepspec.model.targets import TargetPlaces, Targets
from tests.model.drafts import plain_logits

N, U, D, V, R = 23, 7, 12, 50, 5
CASES = {
    "dspark": {"ce", "tv"},
    "dflash": {"ce"},
    "tv alone": {"tv"},
    "eagle3": {"soft_ce"},
    "all": {"ce", "soft_ce", "tv"},
    "none": set(),
}


def made(seed: int, *, markov: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        "states": torch.randn(N, D, generator=generator),
        "lm_head": torch.randn(V, D, generator=generator),
    }
    if markov:
        made |= {
            "features": torch.randn(N, R, generator=generator),
            "w2": torch.randn(V, R, generator=generator),
        }
    made |= {
        "hidden": torch.randn(3 * U, D, generator=generator),
        "places": torch.randint(0, U, (N,), generator=generator) * 3,
    }
    return made | {
        "labels": torch.randint(V, (N,), generator=generator),
        "weights": torch.rand(3, N, generator=generator) + 0.1,
    }


def plain(
    parts: dict[str, Tensor], terms: set[str], cap: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    vocabulary = Vocabulary(parts["lm_head"], parts.get("w2"), cap)
    logits, target = (
        plain_logits(vocabulary, parts["states"], parts.get("features")),
        plain_logits(vocabulary, parts["hidden"][parts["places"]]),
    )
    log_p, q = logits.log_softmax(-1), target.softmax(-1)
    by_slot = {
        "ce": -log_p.gather(-1, parts["labels"][:, None])[:, 0],
        "soft_ce": -(q * log_p).sum(-1),
        "tv": (log_p.exp() - q).abs().sum(-1),
    }
    weights = dict(zip(("ce", "soft_ce", "tv"), parts["weights"], strict=True))
    total = sum(((weights[name] * by_slot[name]).sum() for name in terms), logits.sum() * 0.0)
    return total, by_slot


def chunked(
    parts: dict[str, Tensor], terms: set[str], cap: float | None, *, compile: bool = False
) -> tuple[Tensor, chunked_loss.Scores]:
    weights = dict(zip(("ce", "soft_ce", "tv"), parts["weights"], strict=True))
    vocabulary = Vocabulary(parts["lm_head"], parts.get("w2"), cap, compile)
    coefficients = Coefficients(**{name: weights[name] for name in terms})
    targets = Targets.gathered(parts["hidden"], TargetPlaces.of(parts["places"]))
    scores = score(
        parts["states"],
        parts.get("features"),
        vocabulary,
        targets,
        labels=parts["labels"],
        coefficients=coefficients,
    )
    return scores.total, scores


def gradients(total: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [name for name in ("states", "features", "w2") if name in parts]
    return dict(
        zip(
            names,
            torch.autograd.grad(3.0 * total, [parts[name] for name in names], allow_unused=True),
            strict=True,
        )
    )


def learning(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: part.clone().requires_grad_(name in ("states", "features", "w2"))
        for name, part in parts.items()
    }


def assert_plain(
    case: str, *, markov: bool, cap: float | None, compile: bool = False, seed: int = 0
) -> None:
    """Sum, terms and gradients are those of the plain formula."""
    parts, terms = made(seed, markov=markov), CASES[case]
    ours, theirs = learning(parts), learning(parts)
    found, scores = chunked(ours, terms, cap, compile=compile)
    wanted, by_slot = plain(theirs, terms, cap)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.ce, by_slot["ce"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.tv, by_slot["tv"], rtol=1e-5, atol=1e-5)
    if "soft_ce" in terms:
        torch.testing.assert_close(scores.soft_ce, by_slot["soft_ce"], rtol=1e-5, atol=1e-5)
    mine, other = gradients(found, ours), gradients(wanted, theirs)
    for name in other:
        torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("markov", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_sum_terms_and_gradients_are_those_of_the_plain_formula(
    case: str, markov: bool, cap: float | None, rows: int, monkeypatch
):
    monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", {"cpu": rows * V, "cuda": 0})
    monkeypatch.setattr(chunked_loss, "MIN_CHUNK", 1)
    assert_plain(case, markov=markov, cap=cap)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("case", CASES)
def test_what_is_compiled_is_the_plain_formula_in_chunks_of_any_length(
    case: str, cap: float | None, monkeypatch: pytest.MonkeyPatch
):
    """With a backend that needs no C++ compiler; lengths are not compiled in."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: object):
        graphs.append(len(graphs))
        return graph.forward

    torch._dynamo.reset()
    function = torch.compile(chunked_loss.slot_terms, dynamic=True, backend=backend)
    monkeypatch.setattr(chunked_loss, "compiled", lambda _, **__: function)
    monkeypatch.setattr(chunked_loss, "MIN_CHUNK", 1)
    found = []
    for rows in (10, 1000, 4):  # chunks of 10, 10 and 3; of 23; of 4 and 3
        monkeypatch.setitem(chunked_loss.CHUNK_ELEMENTS, "cpu", rows * V)
        assert_plain(case, markov=True, cap=cap, compile=True)
        found.append(len(graphs))
    assert found[0] >= 1 and found[1:] == found[:1] * 2


@pytest.mark.long
@pytest.mark.parametrize(("case", "cap"), [("dspark", None), ("all", 3.0)])
def test_what_a_real_compiler_makes_of_it_is_the_plain_formula(
    case: str, cap: float | None, monkeypatch: pytest.MonkeyPatch
):
    torch._dynamo.reset()
    execution.compiled.cache_clear()
    monkeypatch.setitem(chunked_loss.CHUNK_ELEMENTS, "cpu", 4 * V)
    monkeypatch.setattr(chunked_loss, "MIN_CHUNK", 1)
    assert_plain(case, markov=True, cap=cap, compile=True)


def test_under_autocast_it_rounds_where_the_plain_formula_does():
    parts = made(1, markov=True)
    ours, theirs = learning(parts), learning(parts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = (
            chunked(ours, CASES["dspark"], None)[0],
            plain(theirs, CASES["dspark"], None)[0],
        )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    mine, other = gradients(found, ours), gradients(wanted, theirs)
    for name in other:
        assert (mine[name] - other[name]).norm() < 0.02 * other[name].norm(), name


class Largest(TorchDispatchMode):
    """The largest tensor that anything here makes, in elements."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor))]
        )
        return made


def test_nothing_of_slots_times_vocabulary_is_ever_made(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", {"cpu": 4 * V, "cuda": 0})
    monkeypatch.setattr(chunked_loss, "MIN_CHUNK", 1)
    parts = learning(made(2, markov=True))
    with Largest() as ours:
        gradients(chunked(parts, CASES["dspark"], 3.0)[0], parts)
    with Largest() as theirs:
        gradients(plain(parts, CASES["dspark"], 3.0)[0], parts)
    assert theirs.numel == N * V
    assert ours.numel == max(V * D, V * R)


def test_the_gradient_of_bfloat16_weights_does_not_depend_on_the_number_of_chunks(
    monkeypatch: pytest.MonkeyPatch,
):
    """Under DeepSpeed the weights are bfloat16; a chunk of 128 rounds the sum of those before
    it.
    """
    generator = torch.Generator().manual_seed(0)
    states, features, targets = (torch.randn(2048, 32, generator=generator) for _ in range(3))
    lm_head, w2 = (
        torch.randn(300, 32, generator=generator),
        torch.randn(300, 32, generator=generator).bfloat16(),
    )
    labels, weights = torch.randint(0, 20, (2048,), generator=generator), torch.ones(2048)

    def gradient(chunks: int) -> Tensor:
        monkeypatch.setitem(chunked_loss.CHUNK_ELEMENTS, "cpu", 2048 // chunks * 300)
        weight = w2.clone().requires_grad_()
        found = score(
            states,
            features,
            Vocabulary(lm_head, weight, None),
            Targets(targets, TargetPlaces.of(torch.arange(2048))),
            labels=labels,
            coefficients=Coefficients(ce=weights),
        )
        return torch.autograd.grad(found.total, weight)[0].float()

    whole, parts = gradient(1), gradient(128)
    assert (parts - whole).norm() < 1e-3 * whole.norm()


def test_no_slot_at_all_is_a_sum_of_zero_with_a_gradient():
    parts = made(3, markov=True)
    none = learning(
        {
            name: part[:0] if name in ("states", "features", "places", "labels") else part
            for name, part in parts.items()
        }
    )
    none["weights"] = parts["weights"][:, :0]
    total, _ = chunked(none, CASES["dspark"], None)
    assert total.item() == 0
    assert all(float(part.abs().sum()) == 0 for part in gradients(total, none).values())


class Products(TorchDispatchMode):
    """How many matrix products are computed here."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


def test_without_gradients_only_the_terms_are_made():
    """Measuring formed gradients as well, and dropped them: twice the time."""
    parts = learning(made(4, markov=True))
    with torch.no_grad(), Products() as products:
        total, scores = chunked(parts, CASES["all"], None)
    assert products.count == 3  # of states, features and targets with the vocabulary
    assert not total.requires_grad and not scores.tv.requires_grad
    torch.testing.assert_close(
        total, plain(parts, CASES["all"], None)[0].detach(), rtol=1e-5, atol=1e-5
    )


def test_a_gpus_chunks_are_as_large_as_fits_and_no_larger_than_helps(
    monkeypatch: pytest.MonkeyPatch,
):
    gpu, found = torch.device("cuda"), []
    for free in (10**6, 4 * 10**8, 10**9, 10**10, 10**11):
        monkeypatch.setattr(chunked_loss, "usable_bytes", lambda _, free=free: free)
        found.append(chunked_loss.chunk_elements(gpu))
        assert found[-1] * chunked_loss.BYTES_PER_LOGIT <= free / 2
    assert found == [1 << 14, 1 << 22, 1 << 24, 1 << 27, 1 << 27]
    assert chunked_loss.chunk_elements(torch.device("cpu")) == 1 << 22
