"""Building the demo: corpus, tokenizer and target, in a folder that is read like any model's."""

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepspec.config.target import DemoConfig
from deepspec.demo.corpus import Corpus, DemoConversation, make_corpus
from deepspec.demo.target import Example, Progress, new_target, train_target
from deepspec.demo.tokenizer import train_tokenizer

log = logging.getLogger(__name__)


class DemoSummary(NamedTuple):
    """What was built: `tokens` are those of the corpus, questions and answers.

    `loss` is the mean per answer token (nats) over the last tenth of the steps.
    """

    conversations: int
    tokens: int
    parameters: int
    loss: float
    seconds: float


def no_progress(done: int, total: int, numbers: dict[str, float]) -> None:
    """Show nothing."""


def build_demo(
    folder: Path, config: DemoConfig, *, on_progress: Progress = no_progress
) -> DemoSummary:
    """Write `target/`, `prompts.jsonl` and `benchmarks/{math,code,chat}.jsonl` into `folder`.

    `target/` is a Hugging Face folder. The same configuration on the same machine, Python and
    library versions and number of threads gives the same bytes; on another machine the prompts stay
    the same as long as the Python version does, the weights differ by rounding.
    """
    started = time.monotonic()
    corpus = make_corpus(config)
    write_prompts(folder, corpus)
    tokenizer = train_tokenizer(
        (text for row in corpus.training for text in (row.question, row.answer)),
        vocab_size=config.vocab_size,
    )
    examples = [encode(tokenizer, row) for row in corpus.training]
    num_tokens = sum(len(example.input_ids) for example in examples)
    model = new_target(config, tokenizer)
    loss = train_target(model, examples, config, on_progress)
    model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    seconds = time.monotonic() - started
    summary = DemoSummary(len(examples), num_tokens, model.num_parameters(), loss, seconds)
    log.info("conversations=%d tokens=%d parameters=%d loss=%.3f seconds=%.1f", *summary)
    return summary


def write_prompts(folder: Path, corpus: Corpus) -> None:
    """Write the training prompts in the corpus's order, and a benchmark of each domain."""
    (folder / "benchmarks").mkdir(parents=True, exist_ok=True)
    prompts = ({"messages": row.messages[:1], "domain": row.domain} for row in corpus.training)
    _write_jsonl(folder / "prompts.jsonl", prompts)
    for domain, rows in corpus.held_out.items():
        turns = ({"turns": [row.question]} for row in rows)
        _write_jsonl(folder / "benchmarks" / f"{domain}.jsonl", turns)


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def encode(tokenizer: Any, row: DemoConversation) -> Example:
    """A conversation as other stages render it: the template's prompt, the answer, its end."""
    prompt: Sequence[int] = tokenizer.apply_chat_template(
        row.messages[:1], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    answer = tokenizer.encode(row.answer, add_special_tokens=False)
    return Example([*prompt, *answer, tokenizer.eos_token_id], len(prompt), row.domain)
