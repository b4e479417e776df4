"""The reference vectors: every case of a folder computed again, and its largest errors.

What a case is follows from the keys of its JSON.
"""

from pathlib import Path

from deepspec.target.conformance import Check
from tests.vectors.cases import Case, read_cases
from tests.vectors.decoding import check_decoding_case
from tests.vectors.loss import check_loss_case
from tests.vectors.training import check_block_case, check_eagle3_case


def run_vectors(folder: Path) -> dict[str, list[Check]]:
    """The checks of each case of a folder.

    Raises:
        DataError: no cases, or a case with a file missing.
    """
    return {case.name: check_case(case) for case in read_cases(folder)}


def check_case(case: Case) -> list[Check]:
    """Everything about one case, whatever its kind; a kind unknown here fails by name."""
    fields = case.fields
    if "variants" in fields:
        return check_loss_case(case)
    if "target_weights" in fields:
        return check_decoding_case(case)
    if "step_losses" in fields:
        return check_eagle3_case(case)
    if "state_dict" in fields and "loss_args" in fields:
        return check_block_case(case)
    return [
        Check(
            "kind of case",
            1.0,
            note="neither training, loss-only nor decoding: " + ", ".join(sorted(fields))[:60],
        )
    ]
