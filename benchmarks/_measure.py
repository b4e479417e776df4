"""What the scripts here share: medians of rounds in which the sides take turns, and the last
line that they print.
"""

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import ArtifactKey
from deepspec.cache.codecs import make_codec
from deepspec.cache.format import EncodedTensor, HiddenSample, Layout, last_hidden_spans
from deepspec.storage.urls import open_store

ROUNDS = 5
LAYERS, HIDDEN_SIZE = 5, 2560  # of Qwen3-4B as captured


def alternate(
    sides: Mapping[str, Callable[[], float]], *, rounds: int = ROUNDS
) -> dict[str, float]:
    """The median of what each side returns; sides take turns, and turns at going first, after
    one warm-up round each.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for name in sides:
        sides[name]()
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            found[name].append(sides[name]())
    return {name: statistics.median(values) for name, values in found.items()}


def result(
    name: str, ratios: Mapping[str, float], goals: Mapping[str, float], **more: object
) -> dict[str, object]:
    """The object to print: `ok` where every goal is reached."""
    ok = all(ratios[key] >= goal for key, goal in goals.items())
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    return {
        "name": name,
        "ratios": dict(ratios),
        "goals": dict(goals),
        "ok": ok,
        **more,
        "machine": machine,
    }


def raw_layout(*, layers: int = LAYERS, hidden_size: int = HIDDEN_SIZE) -> Layout:
    context = make_codec("raw", num_layers=layers, hidden_size=hidden_size)
    return Layout(context, make_codec("raw", num_layers=1, hidden_size=hidden_size), {})


def make_samples(count: int, num_tokens: int, layout: Layout) -> list[HiddenSample]:
    """Random states, two thirds of the tokens supervised."""
    mask = [index > num_tokens // 3 for index in range(num_tokens)]
    spans = torch.from_numpy(last_hidden_spans(mask))
    generator = torch.Generator().manual_seed(0)

    def stored(codec, rows: int) -> EncodedTensor:
        return EncodedTensor(
            codec,
            codec.quantize(
                torch.randn(
                    rows, codec.num_layers, codec.hidden_size, generator=generator
                ).bfloat16()
            ),
        )

    ids, kept = torch.arange(num_tokens, dtype=torch.int32), int(spans[:, 1].sum())
    supervised = torch.tensor(mask, dtype=torch.uint8)
    return [
        HiddenSample(
            number,
            ids,
            supervised,
            stored(layout.context, num_tokens),
            stored(layout.last_hidden, kept),
            spans,
        )
        for number in range(count)
    ]


def hidden_artifact(folder: Path) -> Artifact:
    return Artifact(
        open_store(str(folder)), ArtifactKey("hidden", "benchmark", "0123456789ab", {}, ())
    )


def peak_bytes() -> int:
    """Peak memory of this process since it began to run its program; what `getrusage` says
    includes the parent's.
    """
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def orders(count: int, length: int) -> Sequence[list[int]]:
    """Random orders of `length` sample numbers, the same for every side."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(count, (length,), generator=generator).tolist() for _ in range(ROUNDS + 1)
    ]
