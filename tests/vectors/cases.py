"""Cases read from a folder, and the comparison of numbers with theirs."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from deepspec.errors import DataError
from deepspec.model.checkpoint import empty_draft, load_tensors
from deepspec.model.config_json import spec_from_config
from deepspec.model.drafter import Drafter
from deepspec.target.conformance import Check


class Case(NamedTuple):
    """One JSON file of a folder of reference vectors, and the tensors that belong to it."""

    path: Path
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.stem

    def tensors(self) -> dict[str, Tensor]:
        return self.load(self.path.with_suffix(".safetensors").name)

    def load(self, *names: str) -> dict[str, Tensor]:
        """Tensors of files in the case's folder; later files override or add to earlier ones.

        Raises:
            DataError: a file that is not there.
        """
        tensors: dict[str, Tensor] = {}
        for name in names:
            file = self.path.with_name(name)
            if not file.is_file():
                raise DataError(
                    "a file of the case is missing",
                    where=str(file),
                    fix="copy the folder of vectors whole",
                )
            tensors |= load_file(file)
        return tensors

    def draft(
        self,
        config: dict[str, Any],
        weights: Sequence[str],
        state_dict: dict[str, list[int]] | None = None,
    ) -> Drafter:
        """The case's draft in float32; `state_dict` names its tensors where the files hold
        those of more drafts than one.
        """
        tensors = self.load(*weights)
        if state_dict is not None:
            tensors = {name: tensor for name, tensor in tensors.items() if name in state_dict}
        draft = empty_draft(spec_from_config(config))
        load_tensors(
            draft, tensors, dtype=torch.float32, where=f"{self.path.parent}: {', '.join(weights)}"
        )
        return draft


def read_cases(folder: Path) -> list[Case]:
    """Every case of a folder, by what the files hold and not by their names.

    Raises:
        DataError: no folder, no case, or a file that is not JSON.
    """
    fix = "give a folder with NAME.json and NAME.safetensors of each case"
    try:
        found = [
            Case(path, json.loads(path.read_text(encoding="utf-8")))
            for path in sorted(folder.glob("*.json"))
        ]
    except (OSError, ValueError) as error:
        raise DataError(
            f"the reference vectors cannot be read: {error}", where=str(folder), fix=fix
        ) from None
    if not found:
        raise DataError("there are no reference vectors here", where=str(folder), fix=fix)
    return found


def relative(found: float, wanted: float, *, floor: float = 0.0) -> float:
    """|found - wanted| as a share of |wanted|, or of `floor` where that is more."""
    scale = max(abs(wanted), floor)
    return abs(found - wanted) / scale if scale else abs(found)


def logit_gap(logits: Tensor, likeliest: Tensor) -> float:
    """How far below its row's largest logit the token named likeliest is; 0 where both agree,
    small where they tie.
    """
    if not logits.numel():
        return 0.0
    return (
        (logits.max(-1).values - logits.gather(-1, likeliest.long()[..., None])[..., 0])
        .max()
        .item()
    )


def worst(quantity: str, errors: dict[str, float], tolerance: float) -> Check:
    """One check of many errors of a kind; the note names the largest."""
    if not errors:
        return Check(quantity, 0.0, tolerance, "none stored")
    name = max(errors, key=lambda key: (math.isnan(errors[key]), errors[key]))
    return Check(quantity, errors[name], tolerance, f"{name} of {len(errors)}")
