"""A plan as a terminal shows it: one line a number, with where it comes from."""

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table

from deepspec.formatting import human_bytes, human_count, human_hours
from deepspec.plan.arithmetic import Fit, Histogram
from deepspec.plan.cache_size import is_assumed
from deepspec.plan.parts import PER_PROMPTS, Plan

BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 100  # of a table that goes to a file or a pipe
Line = tuple[str, str, str]  # what, how much, where the number comes from


def render(plan: Plan) -> RenderableType:
    """The whole plan, the verdict and the notes last."""
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


def print_plan(plan: Plan, *, is_terminal: bool) -> None:
    """Print it, in a log as wide as its tables need."""
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
    sizes = part.per_sample
    quantiles = f"p5 {sizes.p5} p50 {sizes.p50} p95 {sizes.p95} max {sizes.max}"
    yield "tokens per sample", quantiles, ""
    yield "", _bars(sizes), f"0 to {sizes.max} tokens"
    yield "supervised", f"{part.supervised.value:.1%} of the tokens", part.supervised.origin
    cut = f"{part.cut_samples.value:.1%} of samples, {part.cut_tokens.value:.1%} of tokens"
    yield "cut by max_length", cut, part.cut_samples.origin


def _bars(lengths: Histogram) -> str:
    """One character a bin, the fullest bin at full height, an empty one blank."""
    fullest = max(max(lengths.bins), 1)
    return "".join(BARS[-(-count * (len(BARS) - 1) // fullest)] for count in lengths.bins)


def _size_lines(plan: Plan) -> Iterator[Line]:
    part = plan.size
    for codec, size in part.bytes_by_codec.items():
        mark = "  <- this run" if codec == part.codecs else ""
        origin = "ratio assumed" if is_assumed(codec) else "by arithmetic"
        yield codec, f"{human_bytes(size)}{mark}", origin
    yield "embedding, lm_head", human_bytes(part.frozen_bytes.value), part.frozen_bytes.origin
    yield "still missing", human_bytes(part.missing_bytes.value), part.missing_bytes.origin
    shards = f"{part.shards.value:,.0f} of {human_bytes(part.shard_bytes.value)}"
    yield "shards", shards, part.shards.origin
    yield "S3 PUTs", f"{part.puts.value:,.0f}", part.puts.origin
    yield "S3 GETs per pass", f"{part.gets_per_pass.value:,.0f}", part.gets_per_pass.origin


def _capture_lines(plan: Plan) -> Iterator[Line]:
    part = plan.capture
    speed = f"{human_count(part.tokens_per_s.value)} tokens/s"
    yield "speed of a lane", speed, part.tokens_per_s.origin
    yield "time", human_hours(part.hours.value), part.hours.origin
    if part.hours_left.value < part.hours.value:
        yield "time left", human_hours(part.hours_left.value), part.hours_left.origin
    yield "writes", f"{human_bytes(part.bytes_per_s.value)}/s", part.bytes_per_s.origin
    if store := part.store_bytes_per_s:
        yield "the store takes", f"{human_bytes(store.value)}/s", store.origin
    else:
        yield "the store takes", "not measured", "too little room to try"


def _training_lines(plan: Plan) -> Iterator[Line]:
    part = plan.training
    size = f"{human_count(part.draft_parameters.value)} trainable parameters"
    yield "draft", size, part.draft_parameters.origin
    yield "passes", f"{part.passes.value:.3g}", part.passes.origin
    yield "time", human_hours(part.hours.value), part.hours.origin
    yield "reads", f"{human_bytes(part.read_bytes_per_s.value)}/s", part.read_bytes_per_s.origin


def _source_lines(plan: Plan) -> Iterator[Line]:
    part = plan.sources
    for option in part.options:
        mark = " <- this run" if option.name == part.chosen else ""
        takes = f"{human_bytes(option.num_bytes)}, captured {option.captures:.3g} x{mark}"
        capture, whole = human_hours(option.capture_gpu_hours), human_hours(option.hours)
        fits = {None: "", True: ", fits", False: ", does NOT fit"}[option.fits]
        yield option.name, takes, f"{capture} of capture, {whole} in all{fits}"
    yield "cheapest", f"resources.training.source={part.best}", ""


def _verdict(fit: Fit | None) -> str:
    if fit is None:
        return "fit: not known"
    if fit.free_bytes is None:
        return "fit: the store can be written to and has no known limit"
    needed, reserve = human_bytes(fit.needed_bytes), human_bytes(fit.reserve_bytes)
    verdict = "it fits" if fit.fits else "it does NOT fit"
    free = human_bytes(fit.free_bytes)
    return f"fit: {needed} missing + {reserve} reserve, {free} free: {verdict}"
