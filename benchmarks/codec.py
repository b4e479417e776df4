"""Codecs of hidden states: sizes and errors on a trained transformer's states, speed of one core,
terabytes of the presets.

The transformer is the demo's target, wider and shallower, trained here for a minute; its states are
those of its corpus. Speed is of 1,000-token samples of Qwen3-4B's size, synthetic, alternated with
memcpy. L layers, D hidden size, T tokens.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from deepspec.artifacts.run import Run
from deepspec.cache.codec_base import Codec, CodecName, Compression
from deepspec.cache.codecs import channel_scale, make_codec
from deepspec.cache.fidelity import Fidelity, measure, refuse
from deepspec.config.resources import FidelityConfig

SCALE_TOKENS, TOKENS, SAMPLE_TOKENS, ROUNDS = 2000, 12_000, 1000, 5
WIDTHS = {"Qwen3-4B": 2560, "Qwen3-8B": 4096, "Qwen3-14B": 5120, "gemma4-12b": 3840}
NUM_TOKENS, NUM_SAMPLES, LAYERS = 1.24e9, 1.3e6, 5
# supervised tokens, and one more on each side of a run
KEPT_LAST = 2 / 3 + 2 * NUM_SAMPLES / NUM_TOKENS
SAMPLE_BYTES = 720 + 60  # Arrow's framing, and the index
IDS_BYTES = 4 + 1  # token id and loss mask
GOALS = {
    "lossless: raw/stored on real states": 1.40,
    "int8: raw/stored on real states": 1.96,
    "lossless decode, GB/s": 0.6,
    "int8 decode, GB/s": 3.0,
    "18.5 TB/Qwen3-4B as int8": 1.0,
    "26 TB/Qwen3-4B as lossless": 1.0,
}


class Choice(NamedTuple):
    """A codec for the context and one for the last hidden state."""

    context: CodecName
    last: CodecName
    compression: Compression = "none"


CHOICES = {
    "raw": Choice("raw", "raw"),
    "lossless": Choice("lossless", "lossless"),
    "int8": Choice("int8", "int8"),
    "int8 zstd": Choice("int8", "int8", "zstd"),
    "int8, lossless last": Choice("int8", "lossless"),
    "fp8, int8 last": Choice("fp8", "int8"),
    "fp8, int8 last, zstd": Choice("fp8", "int8", "zstd"),
}


class States(NamedTuple):
    context: Tensor  # [T, L, D] bfloat16
    last: Tensor  # [T, D] bfloat16
    logits: Callable[[Tensor], Tensor]


class Stored(NamedTuple):
    # of the zstd frames of the context and the last state: stored bytes over all
    shrinkage: tuple[float, float]
    token_bytes: float  # of both and the ids, nothing trimmed
    fidelity: Fidelity


def main() -> dict[str, object]:
    console = Console(stderr=True)
    # speeds are of one core; and threads that wait for each other on a busy machine train slower
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as store:
        states = real_states(store)
    stored = {name: measure_choice(choice, states) for name, choice in CHOICES.items()}
    console.print(errors_table(stored, hidden_size=states.context.shape[-1]))
    speeds = measure_speeds()
    console.print(speed_table(speeds))
    terabytes = {
        name: {preset: project(CHOICES[name], found, width) for preset, width in WIDTHS.items()}
        for name, found in stored.items()
    }
    console.print(terabytes_table(terabytes))
    raw = stored["raw"].token_bytes
    ratios = {
        f"{name}: raw/stored on real states": raw / found.token_bytes
        for name, found in stored.items()
        if name != "raw"
    }
    ratios |= {
        f"{name} {side}, GB/s": value
        for name, sides in speeds.items()
        for side, value in sides.items()
    }
    ratios |= {
        "18.5 TB/Qwen3-4B as int8": 18.5 / terabytes["int8"]["Qwen3-4B"],
        "26 TB/Qwen3-4B as lossless": 26 / terabytes["lossless"]["Qwen3-4B"],
    }
    for name, found in stored.items():
        refuse(found.fidelity, FidelityConfig(), where=name)
    ok = all(ratios[name] >= goal for name, goal in GOALS.items())
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    errors = {name: found.fidelity._asdict() for name, found in stored.items()}
    return {
        "name": "codec",
        "ratios": ratios,
        "goals": GOALS,
        "ok": ok,
        "errors": errors,
        "terabytes": terabytes,
        "machine": machine,
    }


def real_states(store: str) -> States:
    """States of the corpus of a demo target of width 128, trained in the given store."""
    from deepspec.config.recipes import load_run
    from deepspec.demo.corpus import make_corpus
    from deepspec.demo.stage import encode, run_demo
    from deepspec.target.chat import load_chat, target_folder
    from deepspec.target.loading import load_target

    demo = [
        "demo.hidden_size=128",
        "demo.num_layers=8",
        "demo.steps=150",
        "demo.conversations=3000",
        "target.layer_ids=[1, 2, 4, 5, 6]",
    ]
    config = load_run("demo", [*demo, "resources.storage.min_free_gb=0"], store=store)
    run_demo(Run(config))
    tokenizer = load_chat(Run(config)).tokenizer
    target = load_target(config.target, folder=target_folder(Run(config)), device="cpu")
    context: list[Tensor] = []
    last: list[Tensor] = []
    for row in make_corpus(config.demo).training:
        if sum(map(len, last)) >= SCALE_TOKENS + TOKENS:
            break
        output = target.forward(torch.tensor([encode(tokenizer, row).input_ids]))
        context.append(output.context[0].unflatten(-1, (LAYERS, -1)).bfloat16())
        last.append(output.last_hidden[0].bfloat16())
    return States(
        torch.cat(context), torch.cat(last), lambda hidden: target.logits(hidden.to(target.dtype))
    )


def measure_choice(choice: Choice, states: States) -> Stored:
    """Scales from the first tokens, sizes and errors from all the others, in samples of 1,000
    tokens.
    """
    first, rest = slice(None, SCALE_TOKENS), slice(SCALE_TOKENS, SCALE_TOKENS + TOKENS)
    codecs: tuple[tuple[CodecName, Tensor], ...] = (
        (choice.context, states.context),
        (choice.last, states.last[:, None]),
    )
    decoded, token_bytes, shrinkage = [], [], []
    for name, values in codecs:
        codec = build(name, values[first], compression=choice.compression)
        made, size, framed = [], 0, 0
        for sample in values[rest].split(SAMPLE_TOKENS):
            buffers = codec.compress(codec.quantize(sample))
            size += sum(buffer.size for buffer in buffers)
            framed += sum(
                buffer.size
                for buffer, column in zip(buffers, codec.columns, strict=True)
                if column.storage == "frame"
            )
            made.append(codec.dequantize(codec.expand(buffers, len(sample))))
        decoded.append(torch.cat(made))
        token_bytes.append(size / len(values[rest]))
        frames = sum(column.token_bytes for column in codec.columns if column.storage == "frame")
        shrinkage.append(framed / len(values[rest]) / frames if frames else 1.0)
    found = measure(
        states.context[rest],
        decoded[0],
        last=states.last[rest],
        decoded_last=decoded[1],
        logits=states.logits,
    )
    return Stored((shrinkage[0], shrinkage[1]), sum(token_bytes) + IDS_BYTES + 1, found)


def build(name: CodecName, first: Tensor, *, compression: Compression) -> Codec:
    sizes: dict[str, Any] = {"num_layers": first.shape[1], "hidden_size": first.shape[2]}
    return make_codec(name, compression=compression, channel_scale=channel_scale(first), **sizes)


def llm_like(num_tokens: int, hidden_size: int) -> Tensor:
    """Unequal channels, some up to 60 times the rest, and a massive first token: what large
    models are seen to have.
    """
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp(torch.randn(LAYERS, hidden_size, generator=generator) * 0.5)
    scale[:, :20] *= torch.empty(20).uniform_(10, 60, generator=generator)
    states = torch.randn(num_tokens, LAYERS, hidden_size, generator=generator) * scale
    states[0, :, :3] = 6000
    return states[..., torch.randperm(hidden_size, generator=generator)].bfloat16()


def measure_speeds() -> dict[str, dict[str, float]]:
    """GB/s of bfloat16 in or out, one thread, medians; `quantize` is the device's part, done by
    the CPU here.
    """
    states = llm_like(SAMPLE_TOKENS, WIDTHS["Qwen3-4B"])
    out = torch.empty(SAMPLE_TOKENS, states[0].numel(), dtype=torch.bfloat16)
    jobs: dict[tuple[str, str], Callable[[], object]] = {
        ("memcpy", "copy"): lambda: out.copy_(states.flatten(1))
    }
    for name, compression in (
        ("raw", "none"),
        ("lossless", "none"),
        ("int8", "none"),
        ("int8", "zstd"),
        ("fp8", "none"),
        ("fp8", "zstd"),
    ):
        codec = build(name, states, compression=compression)  # type: ignore[arg-type]
        label = name if compression == "none" else f"{name} zstd"
        parts = codec.quantize(states)
        buffers = codec.compress(parts)
        jobs[label, "quantize"] = lambda codec=codec: codec.quantize(states)  # type: ignore[misc]
        jobs[label, "compress"] = lambda codec=codec, parts=parts: codec.compress(parts)  # type: ignore[misc]
        jobs[label, "decode"] = lambda codec=codec, buffers=buffers: codec.dequantize(
            codec.expand(buffers, SAMPLE_TOKENS), out
        )  # type: ignore[misc]
    seconds: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
    for number in range(ROUNDS + 1):
        for job, run in jobs.items():
            for turn in (run,) if job[0] == "memcpy" else (jobs["memcpy", "copy"], run):
                started = time.perf_counter()
                turn()
                if number:  # the first round warms up
                    seconds[("memcpy", "copy") if turn is not run else job].append(
                        time.perf_counter() - started
                    )
    found: dict[str, dict[str, float]] = {}
    for (name, side), times in seconds.items():
        # views
        if (name, side) not in {
            ("raw", "quantize"),
            ("raw", "compress"),
            ("int8", "compress"),
            ("fp8", "compress"),
        }:
            found.setdefault(name, {})[side] = 2 * states.numel() / statistics.median(times) / 1e9
    return found


def project(choice: Choice, stored: Stored, width: int) -> float:
    """Terabytes of a preset's cache, trimmed to the supervised tokens' last hidden states;
    frames shrink as measured here.
    """
    token_bytes = float(IDS_BYTES)
    for name, layers, share, shrinkage in (
        (choice.context, LAYERS, 1.0, stored.shrinkage[0]),
        (choice.last, 1, KEPT_LAST, stored.shrinkage[1]),
    ):
        codec = make_codec(
            name, num_layers=layers, hidden_size=width, compression=choice.compression
        )
        token_bytes += share * sum(
            column.token_bytes * (shrinkage if column.storage == "frame" else 1)
            for column in codec.columns
        )
    return (token_bytes * NUM_TOKENS + SAMPLE_BYTES * NUM_SAMPLES) / 1e12


def errors_table(stored: dict[str, Stored], *, hidden_size: int) -> Table:
    columns = (
        "codec",
        "bytes/token",
        "ratio",
        "relative",
        "worst channel",
        "cosine mean",
        "cosine min",
        "TV",
        "argmax kept",
    )
    table = Table(
        *columns,
        title=f"a trained transformer of width {hidden_size}, {LAYERS} layers and the last: "
        "12 D + 6 bytes/token raw",
    )
    for name, found in stored.items():
        error = found.fidelity
        shares = (f"{value:.3%}" for value in (error.relative_error, error.worst_channel_error))
        cosines = (f"{value:.6f}" for value in (error.mean_cosine, error.min_cosine))
        ratio = (12 * hidden_size + 6) / found.token_bytes
        table.add_row(
            name,
            f"{found.token_bytes:.0f}",
            f"{ratio:.3f}",
            *shares,
            *cosines,
            f"{error.total_variation:.3%}",
            f"{error.argmax_agreement:.2%}",
        )
    return table


def speed_table(speeds: dict[str, dict[str, float]]) -> Table:
    sides = ("copy", "quantize", "compress", "decode")
    table = Table(
        "codec",
        *sides,
        title=f"GB/s of bfloat16 on one core, {SAMPLE_TOKENS} tokens of {LAYERS} x 2560",
    )
    for name, found in speeds.items():
        table.add_row(name, *(f"{found[side]:.2f}" if side in found else "" for side in sides))
    return table


def terabytes_table(terabytes: dict[str, dict[str, float]]) -> Table:
    table = Table(
        "codec",
        *WIDTHS,
        title="terabytes, projected: 1.24e9 tokens, 1.3e6 samples, last hidden states trimmed",
    )
    untrimmed = ((12 * width + 6) * NUM_TOKENS / 1e12 for width in WIDTHS.values())
    table.add_row("raw, not trimmed", *(f"{value:.1f}" for value in untrimmed))
    for name, found in terabytes.items():
        table.add_row(name, *(f"{value:.1f}" for value in found.values()))
    return table


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main()) + "\n")
