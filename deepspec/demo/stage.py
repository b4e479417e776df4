"""The demo stage: a tiny target with its prompts and benchmarks, an artifact like any other.

`target/` is a folder that the other stages read like any model's.
"""

import json
import logging
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.config.target import DemoConfig
from deepspec.demo.corpus import DemoConversation, make_corpus
from deepspec.demo.target import Example, new_target, train_target, train_tokenizer
from deepspec.errors import ConfigError
from deepspec.process.events import Report, silent

log = logging.getLogger(__name__)


def run_demo(run: Run, report: Report = silent) -> Artifact:
    """Make and seal the demo's folder, unless it is there already."""
    if (config := run.config.demo) is None:
        raise ConfigError(
            "this run has no demo section", where="demo", fix="use one of the demo recipes"
        )
    artifact = run.create("demo")
    if artifact.manifest() is not None:
        return artifact
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build_demo(folder, config, report)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        for name in names:
            artifact.put_file(folder / name, name)
    artifact.seal(files=names, inputs={})
    return artifact


def build_demo(folder: Path, config: DemoConfig, report: Report) -> None:
    """Write `target/`, `prompts.jsonl` and `benchmarks/{math,code,chat}.jsonl` into `folder`.

    `target/` is a Hugging Face folder. The same configuration on the same machine, Python and
    library versions and number of threads gives the same bytes; on another machine the prompts stay
    the same as long as the Python version does, the weights differ by rounding.
    """
    started = time.monotonic()
    corpus = make_corpus(config)
    prompts = ({"messages": row.prompt, "domain": row.domain} for row in corpus.training)
    _write_jsonl(folder / "prompts.jsonl", prompts)
    for domain, rows in corpus.held_out.items():
        turns = ({"turns": [row.question]} for row in rows)
        _write_jsonl(folder / "benchmarks" / f"{domain}.jsonl", turns)
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


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def encode(tokenizer: Any, row: DemoConversation) -> Example:
    """A conversation as other stages render it: the template's prompt, the answer, its end."""
    prompt = tokenizer.apply_chat_template(
        row.prompt, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    answer = tokenizer.encode(row.answer, add_special_tokens=False)
    return Example([*prompt, *answer, tokenizer.eos_token_id], len(prompt), row.domain)
