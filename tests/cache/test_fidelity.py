"""The gate of lossy codecs: numbers worked out by hand, and a refusal that names every broken
limit.
"""

import math

import pytest
import torch
from torch import Tensor

from deepspec.cache import fidelity
from deepspec.cache.codecs import channel_scale, make_codec
from deepspec.cache.fidelity import Fidelity, measure, refuse
from deepspec.config.resources import FidelityConfig
from deepspec.errors import FidelityTooLow, UserError

NONE = torch.zeros(0, 2)
PERFECT = Fidelity(0.0, 0.0, 1.0, 1.0, 0.0, 1.0)


def no_logits(last: Tensor) -> Tensor:
    raise AssertionError("there is no final hidden state to make logits of")


def test_errors_of_two_tokens_worked_out_by_hand():
    context = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 5.0], [1.0, 0.0]]])  # [2, 2, 2]
    decoded = context.clone()
    decoded[0, 0, 0] = 4.0  # token 0, layer 0: (3, 4) became (4, 4)
    found = measure(context, decoded.flatten(1), last=NONE, decoded_last=NONE, logits=no_logits)
    assert found.relative_error == pytest.approx(1 / math.sqrt(50))
    assert found.worst_channel_error == pytest.approx(1 / 3)
    assert found.min_cosine == pytest.approx(28 / (5 * math.sqrt(32)))
    assert found.mean_cosine == pytest.approx((3 + found.min_cosine) / 4)
    assert (found.total_variation, found.argmax_agreement) == (None, None)


def test_the_worst_layer_counts_not_the_loudest():
    context = torch.ones(4, 2, 8)
    context[:, 0] *= 1000
    decoded = context.clone()
    decoded[:, 1] *= 1.5
    assert measure(
        context, decoded, last=NONE, decoded_last=NONE, logits=no_logits
    ).relative_error == pytest.approx(0.5)


def test_predictions_of_two_tokens_worked_out_by_hand():
    """The states are log-probabilities and the head is the identity: (.8, .2) became (.4, .6),
    the other stayed.
    """
    last, decoded = (
        torch.tensor([[0.8, 0.2], [0.3, 0.7]]).log(),
        torch.tensor([[0.4, 0.6], [0.3, 0.7]]).log(),
    )
    context = torch.ones(3, 1, 2)
    found = measure(context, context, last=last, decoded_last=decoded, logits=lambda states: states)
    assert found.total_variation == pytest.approx(0.4 / 2, abs=1e-6)
    assert found.argmax_agreement == 0.5


def test_the_final_hidden_state_counts_as_a_layer():
    context, last = torch.ones(3, 1, 2), torch.ones(2, 2)
    found = measure(
        context, context, last=last, decoded_last=last * 1.25, logits=lambda states: states
    )
    assert found.relative_error == found.worst_channel_error == pytest.approx(0.25)
    assert found.total_variation == 0


def test_chunks_change_no_number_and_bound_the_logits(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    context, last = (
        torch.randn(50, 2, 8, generator=generator),
        torch.randn(33, 8, generator=generator),
    )
    head, sizes = torch.randn(100, 8, generator=generator), []

    def logits(states: Tensor) -> Tensor:
        sizes.append(len(states))
        return states @ head.T

    noisy = [
        values + 0.1 * torch.randn(values.shape, generator=generator) for values in (context, last)
    ]
    found = []
    for chunk in (1000, 7):
        monkeypatch.setattr(fidelity, "CHUNK_TOKENS", chunk)
        found.append(measure(context, noisy[0], last=last, decoded_last=noisy[1], logits=logits))
    whole, chunked = found
    assert whole == pytest.approx(chunked, rel=1e-6)
    assert max(sizes[2:]) == 7


def test_nothing_and_zeros_are_no_error():
    empty = torch.zeros(0, 2, 4)
    assert measure(empty, empty, last=empty[:, 0], decoded_last=empty[:, 0], logits=no_logits)[
        :4
    ] == (0, 0, 1, 1)
    zeros = torch.zeros(3, 2, 4)
    assert measure(zeros, zeros, last=NONE, decoded_last=NONE, logits=no_logits)[:4] == (0, 0, 1, 1)
    assert measure(zeros, zeros + 1, last=NONE, decoded_last=NONE, logits=no_logits)[:4] == (
        math.inf,
        math.inf,
        0,
        0,
    )


@pytest.mark.parametrize("name", ["lossless", "int8", "fp8"])
def test_every_codec_passes_on_ordinary_states(name: str):
    generator = torch.Generator().manual_seed(0)
    context, last = (
        torch.randn(200, layers, 256, generator=generator).bfloat16() for layers in (2, 1)
    )
    head = torch.randn(500, 256, generator=generator) / 6
    decoded = []
    for values, codec in ((context, name), (last, "int8" if name == "fp8" else name)):
        sizes = {
            "num_layers": values.shape[1],
            "hidden_size": 256,
            "channel_scale": channel_scale(values),
        }
        made = make_codec(codec, **sizes)  # type: ignore[arg-type]
        decoded.append(made.dequantize(made.quantize(values)))
    found = measure(
        context,
        decoded[0],
        last=last[:, 0],
        decoded_last=decoded[1],
        logits=lambda states: states.float() @ head.T,
    )
    refuse(found, FidelityConfig())
    assert (found.relative_error == 0) == (name == "lossless")


def test_what_keeps_its_limits_passes():
    refuse(PERFECT, FidelityConfig())
    refuse(Fidelity(0.04, 9.0, 1.0, 0.995, 0.02, 0.97), FidelityConfig())
    refuse(PERFECT._replace(total_variation=None, argmax_agreement=None), FidelityConfig())


def test_a_refusal_names_every_broken_limit_with_its_value_and_a_way_out():
    with pytest.raises(FidelityTooLow) as caught:
        refuse(
            Fidelity(0.06, 0.1, 0.99, 0.98, 0.05, 0.9), FidelityConfig(), where="hidden.codec fp8"
        )
    for part in (
        "relative_error is 0.06, max_relative_error is 0.04",
        "min_cosine is 0.98, min_cosine is 0.995",
        "total_variation is 0.05, max_total_variation is 0.02",
        "argmax_agreement is 0.9, min_argmax_agreement is 0.97",
    ):
        assert part in caught.value.what
    assert caught.value.where == "hidden.codec fp8"
    assert (
        "choose a codec" in caught.value.fix
        and "max_relative_error, min_cosine" in caught.value.fix
    )
    assert isinstance(caught.value, UserError)


def test_only_the_broken_limit_is_named():
    with pytest.raises(FidelityTooLow) as caught:
        refuse(PERFECT._replace(argmax_agreement=0.5), FidelityConfig())
    assert "relative_error" not in str(caught.value)


@pytest.mark.parametrize(
    "field", ["relative_error", "min_cosine", "total_variation", "argmax_agreement"]
)
def test_a_number_that_is_none_keeps_no_limit(field: str):
    with pytest.raises(FidelityTooLow, match=field):
        refuse(PERFECT._replace(**{field: math.nan}), FidelityConfig())


@pytest.mark.parametrize("where", ["context", "last"])
def test_states_that_are_not_finite_are_refused(where: str):
    context, last = torch.ones(3, 1, 4), torch.ones(3, 4)
    broken = {"context": context.clone(), "last": last.clone()}
    broken[where].view(-1)[5] = math.nan
    found = measure(
        context,
        broken["context"],
        last=last,
        decoded_last=broken["last"],
        logits=lambda states: states,
    )
    assert math.isnan(found.relative_error) and math.isnan(found.worst_channel_error)
    with pytest.raises(FidelityTooLow, match="relative_error is nan"):
        refuse(found, FidelityConfig())
