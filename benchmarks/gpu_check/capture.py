"""Capture by a random target of Qwen3-4B's shape, 8,192 tokens a pass, with each codec: what is
stored, how fast, and the same bytes a second time.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu_check.random_models import random_target, recipe
from benchmarks.gpu_check.section import Bench, relative_error
from deepspec.cache.codecs import channel_scale, make_codec
from deepspec.cache.format import HiddenSample, Layout
from deepspec.cache.shard_writer import Background, ShardWriter
from deepspec.config.data import HiddenConfig
from deepspec.hidden.capture import Capture
from deepspec.hidden.sequences import CaptureRow
from deepspec.hidden.stage import HostCopy
from deepspec.target.model import Target, TargetOutput

WITHIN = {"raw": 2e-2, "lossless": 2e-2, "int8": 4e-2}  # bfloat16 in another order; 8 bits
WAITING_BYTES = 512_000_000


class Captured(NamedTuple):
    checksum: str
    num_bytes: int
    seconds: float
    stalled_s: float
    first: HiddenSample  # as it came to the host


def check(bench: Bench) -> None:
    settings = recipe(bench)
    with bench.part("a random target"):
        target = random_target(bench, torch.bfloat16, settings.target.layer_ids)
        num_tokens, num_rows = (40, 4) if bench.rehearse else (910, 27)
        random = torch.Generator().manual_seed(0)
        vocabulary = target.text_config.vocab_size
        ids = torch.randint(vocabulary, (num_rows, num_tokens), generator=random).tolist()
        mask = [place > num_tokens // 3 for place in range(num_tokens)]
        rows = [
            CaptureRow(number, held_out=False, input_ids=row, loss_mask=mask)
            for number, row in enumerate(ids)
        ]
        wanted = target.forward(torch.tensor(ids[:1], device=bench.device))
        bench.findings.check("a random target", bool(wanted.last_hidden.isfinite().all()))
        for codec in WITHIN:
            with bench.part(codec):
                compare(bench, capture_with(target, codec, wanted), rows, wanted.context[0])


def capture_with(target: Target, codec: str, seen: TargetOutput) -> Capture:
    """The codec's scales are of the states themselves, which is more than a run has."""
    layers, size = len(target.layer_ids), target.text_config.hidden_size
    of_layers = channel_scale(seen.context[0].unflatten(-1, (layers, size))).cpu()
    of_last = channel_scale(seen.last_hidden[0][:, None]).cpu()
    context = make_codec(codec, num_layers=layers, hidden_size=size, channel_scale=of_layers)
    last = make_codec(codec, num_layers=1, hidden_size=size, channel_scale=of_last)
    layout = Layout(context, last, {})
    return Capture(target, layout, HiddenConfig(codec=codec), batch_tokens=8192)


def compare(bench: Bench, capture: Capture, rows: list[CaptureRow], wanted: torch.Tensor) -> None:
    codec, find = capture.settings.codec, bench.findings
    captured = [write(capture, rows, bench.scratch / f"{codec}{n}") for n in range(3)]
    error = relative_error(captured[0].first.context.decode().flatten(1), wanted.cpu())
    find.check(f"{codec}: states of a plain forward pass", error <= WITHIN[codec], f"{error:.1e}")
    checksums = [each.checksum for each in captured]
    find.check(f"{codec}: the same bytes every time", len(set(checksums)) == 1, checksums)
    best = min(captured, key=lambda each: each.seconds)
    num_tokens = sum(len(row.input_ids) for row in rows)
    find.figure(f"{codec}: tokens/s", num_tokens / best.seconds)
    find.figure(f"{codec}: GB/s written", best.num_bytes / best.seconds / 1e9)
    find.figure(f"{codec}: share that waits for the disk", best.stalled_s / best.seconds)


def write(capture: Capture, rows: list[CaptureRow], path: Path) -> Captured:
    """As a shard is captured: the next pass runs while states are copied, encoded and written."""
    host, began, kept = HostCopy(capture.target.device), time.perf_counter(), []

    def encode(sample: HiddenSample, ready: torch.cuda.Event | None):
        context = host.bring(sample.context, ready)
        last_hidden = host.bring(sample.last_hidden, ready)
        on_host = sample._replace(context=context, last_hidden=last_hidden)
        if not kept:
            kept.append(on_host)
        return writer.encode(on_host, held_out=0)

    with ShardWriter(path, capture.layout, 0) as writer:
        with ThreadPoolExecutor(1) as encoder, Background(WAITING_BYTES) as background:
            for row, states in capture.states(rows):
                sample = capture.sample(row, states)
                job = encoder.submit(encode, sample, host.ready())
                background.submit(
                    partial(lambda job: writer.write(job.result()), job), num_bytes=sample.num_bytes
                )
        written = writer.finish()
    seconds = time.perf_counter() - began
    return Captured(written.checksum, path.stat().st_size, seconds, background.stalled_s, kept[0])
