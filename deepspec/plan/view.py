"""A plan as a terminal shows it: a line a number, and beside each where it comes from."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table

from deepspec.formatting import human_bytes, human_count, human_hours
from deepspec.plan.arithmetic import Fit, Histogram
from deepspec.plan.forecast import PER_PROMPTS, Plan

BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 100  # of a table that goes to a file or a pipe
Line = tuple[str, str, str]  # what, how much, where the number comes from


def render(plan: Plan) -> RenderableType:
    """The whole plan; the verdict and the notes come last, where the eye rests."""
    sections = {
        "tokens": _token_lines(plan),
        "cache": _size_lines(plan),
        "capture": _capture_lines(plan),
        "training": _training_lines(plan),
        "where training reads hidden states": _source_lines(plan),
    }
    parts: list[RenderableType] = [f"plan of {plan.run}: target {plan.target}, store {plan.store}"]
    for title, lines in sections.items():
        parts += ["", title, Padding(_table(lines), (0, 0, 0, 2), expand=False)]
    parts += [
        "",
        f"{plan.sources.best}: {plan.sources.reason}",
        _verdict(plan.fit),
        *(f"note: {note}" for note in plan.notes),
    ]
    return Group(*parts)


def show(plan: Plan, *, is_terminal: bool) -> None:
    """Print it, never narrower than a log can be read."""
    Console(width=None if is_terminal else WIDTH, highlight=False).print(render(plan))


def _table(lines: Iterator[Line]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(min_width=21, no_wrap=True)
    table.add_column(min_width=32, no_wrap=True)  # all sections in line, within 80 columns
    table.add_column(style="dim")
    for line in lines:
        table.add_row(*line)
    return table


def _token_lines(plan: Plan) -> Iterator[Line]:
    part = plan.tokens
    if part.prompts is None:
        yield "prompts", "unknown", f"totals below are of {PER_PROMPTS:,} prompts"
    else:
        yield "prompts", f"{part.prompts.value:,.0f}", part.prompts.origin
    error = f" ± {part.error:.0%}" if part.error else ""
    yield "answers", part.answers, ""
    yield "samples", f"{part.samples.value:,.0f}", part.samples.origin
    yield "tokens", f"{human_count(part.tokens.value)}{error}", part.tokens.origin
    lengths = part.per_sample
    yield (
        "tokens per sample",
        f"p5 {lengths.p5} p50 {lengths.p50} p95 {lengths.p95} max {lengths.max}",
        "",
    )
    yield "", f"{_bars(lengths)}", f"0 to {lengths.max} tokens"
    yield "supervised", f"{part.supervised.value:.1%} of the tokens", part.supervised.origin
    cut = f"{part.cut_samples.value:.1%} of samples, {part.cut_tokens.value:.1%} of tokens"
    yield "cut by max_length", cut, part.cut_samples.origin


def _bars(lengths: Histogram) -> str:
    """One character a bin, the fullest as high as it gets; a bin that is not empty is seen."""
    fullest = max(max(lengths.bins), 1)
    return "".join(BARS[-(-count * (len(BARS) - 1) // fullest)] for count in lengths.bins)


def _size_lines(plan: Plan) -> Iterator[Line]:
    part = plan.size
    for codec, size in part.bytes_by_codec.items():
        mark = "  <- this run" if codec == part.codecs else ""
        assumed = (
            "by arithmetic"
            if codec.split(",")[0] in ("raw", "int8", "fp8") and "zstd" not in codec
            else "ratio assumed"
        )
        yield codec, f"{human_bytes(size)}{mark}", assumed
    yield "embedding, lm_head", human_bytes(part.frozen_bytes.value), part.frozen_bytes.origin
    yield "still missing", human_bytes(part.missing_bytes.value), part.missing_bytes.origin
    yield (
        "shards",
        f"{part.shards.value:,.0f} of {human_bytes(part.shard_bytes.value)}",
        part.shards.origin,
    )
    yield "S3 PUTs", f"{part.puts.value:,.0f}", part.puts.origin
    yield "S3 GETs per pass", f"{part.gets_per_pass.value:,.0f}", part.gets_per_pass.origin


def _capture_lines(plan: Plan) -> Iterator[Line]:
    part = plan.capture
    yield (
        "speed of a lane",
        f"{human_count(part.tokens_per_s.value)} tokens/s",
        part.tokens_per_s.origin,
    )
    yield "time", human_hours(part.hours.value), part.hours.origin
    if part.hours_left.value < part.hours.value:
        yield "time left", human_hours(part.hours_left.value), part.hours_left.origin
    yield "writes", f"{human_bytes(part.bytes_per_s.value)}/s", part.bytes_per_s.origin
    if part.store_bytes_per_s is None:
        yield "the store takes", "not measured", "too little room to try"
    else:
        yield (
            "the store takes",
            f"{human_bytes(part.store_bytes_per_s.value)}/s",
            part.store_bytes_per_s.origin,
        )


def _training_lines(plan: Plan) -> Iterator[Line]:
    part = plan.training
    yield (
        "draft",
        f"{human_count(part.draft_parameters.value)} trainable parameters",
        part.draft_parameters.origin,
    )
    yield "passes", f"{part.passes.value:.3g}", part.passes.origin
    yield "time", human_hours(part.hours.value), part.hours.origin
    yield "reads", f"{human_bytes(part.read_bytes_per_s.value)}/s", part.read_bytes_per_s.origin


def _source_lines(plan: Plan) -> Iterator[Line]:
    part = plan.sources
    for option in part.options:
        mark = " <- this run" if option.name == part.chosen else ""
        said = f"{human_bytes(option.num_bytes)}, captured {option.captures:.3g} x{mark}"
        fits = "" if option.fits is None else ", fits" if option.fits else ", does NOT fit"
        yield (
            option.name,
            said,
            f"{human_hours(option.capture_gpu_hours)} of capture, {human_hours(option.hours)} in all{fits}",
        )
    yield "cheapest", f"resources.training.source={part.best}", ""


def _verdict(fit: Fit | None) -> str:
    if fit is None:
        return "fit: not known"
    if fit.free_bytes is None:
        return "fit: the store can be written to and says no limit"
    free = f"{human_bytes(fit.needed_bytes)} missing + {human_bytes(fit.reserve_bytes)} reserve, {human_bytes(fit.free_bytes)} free"
    return f"fit: {free}: {'it fits' if fit.fits else 'it does NOT fit'}"
