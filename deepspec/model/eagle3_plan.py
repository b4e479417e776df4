"""Where Eagle3's training-time test is scored: everything about its loss without a forward pass.

S training-time-test steps, T tokens, P scored places.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.model.anchors import Samples


class Eagle3Plan(NamedTuple):
    """The places that some step is scored at, and which of them each step is scored at."""

    # [P] long, in the packed row, ascending (then fill, which no step counts)
    places: Tensor
    starts: Tensor  # [P] long, where the sample of each begins
    positions: Tensor  # [T] long, of every token within its own sample
    counted: Tensor  # [S, P] bool
    # [P] float32, one over the length of its sample: the loss is a mean per sample, not per token
    weights: Tensor
    num_samples: Tensor  # float32


def plan_steps(
    loss_mask: Tensor, lengths: Tensor, *, num_steps: int, multiple: int = 1
) -> Eagle3Plan:
    """Step s scores position t where t + s is supervised and not its sample's last token.

    Args:
        loss_mask: [T] bool, of all samples one after the other.
        lengths: [S] long, tokens of each sample.
        num_steps: S.
        multiple: places are filled up to a multiple of it, so that shapes repeat.
    """
    num_tokens = len(loss_mask)
    tokens = torch.arange(num_tokens, device=lengths.device)
    samples = Samples.of(lengths).holding(tokens)
    ahead = tokens + torch.arange(num_steps, device=tokens.device)[:, None]  # [S, T]
    counted = loss_mask[ahead.clamp(max=num_tokens - 1)] & (ahead < samples.ends - 1)
    places = counted.any(0).nonzero()[:, 0]
    weights = 1.0 / (samples.ends - samples.starts)[places]
    fill = (0, -len(places) % multiple)
    return Eagle3Plan(
        places=F.pad(places, fill),
        starts=F.pad(samples.starts[places], fill),
        positions=tokens - samples.starts,
        counted=F.pad(counted[:, places], fill),
        weights=F.pad(weights, fill),
        num_samples=weights.new_tensor(len(lengths)),
    )
