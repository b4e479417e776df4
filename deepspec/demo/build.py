"""Building the demo: corpus, tokenizer and target, in a folder that is read like any model's."""

import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deepspec.config.target import DemoConfig
from deepspec.demo.corpus import Corpus, DemoConversation, make_corpus
from deepspec.demo.target import Example, new_target, train_target
from deepspec.demo.tokenizer import train_tokenizer
from deepspec.process.events import Report, silent

log = logging.getLogger(__name__)


def build_demo(folder: Path, config: DemoConfig, report: Report = silent) -> None:
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
    model = new_target(config, tokenizer)
    loss = train_target(model, examples, config, report)
    model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    log.info(
        "conversations=%d tokens=%d parameters=%d loss=%.3f seconds=%.1f",
        len(examples),
        sum(len(example.input_ids) for example in examples),
        model.num_parameters(),
        loss,
        time.monotonic() - started,
    )


def write_prompts(folder: Path, corpus: Corpus) -> None:
    """Write the training prompts in the corpus's order, and a benchmark of each domain."""
    (folder / "benchmarks").mkdir(parents=True, exist_ok=True)
    prompts = ({"messages": row.prompt, "domain": row.domain} for row in corpus.training)
    _write_jsonl(folder / "prompts.jsonl", prompts)
    for domain, rows in corpus.held_out.items():
        turns = ({"turns": [row.question]} for row in rows)
        _write_jsonl(folder / "benchmarks" / f"{domain}.jsonl", turns)


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def encode(tokenizer: Any, row: DemoConversation) -> Example:
    """A conversation as other stages render it: the template's prompt, the answer, its end."""
    prompt = tokenizer.apply_chat_template(
        row.prompt, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    answer = tokenizer.encode(row.answer, add_special_tokens=False)
    return Example([*prompt, *answer, tokenizer.eos_token_id], len(prompt), row.domain)
