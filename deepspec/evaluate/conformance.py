"""What a user runs on a new target: the target's own checks, and those of a draft of each algorithm
built for it.
"""

import json
from pathlib import Path
from typing import Any

from deepspec.config.families import family_of, text_config
from deepspec.config.target import TargetConfig
from deepspec.errors import DataError
from deepspec.evaluate.draft_checks import ALGORITHMS, check_draft
from deepspec.target.conformance import SHORTEST, Check, check_chat, check_target, make_rows, spread
from deepspec.target.loading import load_target
from deepspec.target.model import Target


def run_target_checks(folder: Path) -> dict[str, list[Check]]:
    """Checks of the model in `folder`, its chat template if it has a tokenizer, and drafts of it.

    Raises:
        ConfigError: an unknown family, or one with parts that drafts do not have.
        DataError: no model there.
    """
    config = _read_config(folder)
    text, family = text_config(config), family_of(config)
    settings = TargetConfig(
        model=str(folder),
        chat_family=family.chat_family,
        dtype="float32",
        layer_ids=spread(text["num_hidden_layers"]),
        mask_token_id=text["vocab_size"] - 1,
    )
    target = load_target(settings, folder=folder)
    rows = make_rows(target)
    checks = {"target": check_target(target, rows), "chat": check_chat(folder, settings)}
    # Eagle3 cannot read the embedding output, layer -1.
    layers = [layer for layer in target.layer_ids if layer >= 0]
    for name, algorithm in ALGORITHMS.items():
        of_draft = Target(target.model, layers) if name == "eagle3" else target
        checks[name] = check_draft(of_draft, config, algorithm, [row[:SHORTEST] for row in rows])
    return checks


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"there is no model here: {error}"
        fix = "give a folder with config.json"
        raise DataError(what, where=str(folder), fix=fix) from None
    return config
