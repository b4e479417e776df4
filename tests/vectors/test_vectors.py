"""The reference vectors hold, every case of the folder; and the comparison notices what is
wrong.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from deepspec.config.draft import LossConfig
from deepspec.errors import DataError
from deepspec.model.block_draft import BlockDraft
from deepspec.model.eagle3 import Eagle3Draft
from deepspec.target.conformance import Check
from tests.conftest import SHARED
from tests.model.drafts import CONFIGS, TARGETS, make_batch, make_draft
from tests.vectors.__main__ import app
from tests.vectors.cases import Case, read_cases
from tests.vectors.run import check_case, run_vectors
from tests.vectors.written_cases import write_block_case, write_eagle3_case

FOLDER = SHARED / "reference-vectors"
CASES = sorted(path.stem for path in FOLDER.glob("*.json"))
needs_vectors = pytest.mark.skipif(not CASES, reason=f"reference vectors are not at {FOLDER}")


def outside(checks: list[Check]) -> list[Check]:
    return [check for check in checks if not check.passed]


@needs_vectors
@pytest.mark.parametrize("name", CASES or ["none"])
def test_the_reference_is_reproduced(name: str) -> None:
    case = Case(FOLDER / f"{name}.json", json.loads((FOLDER / f"{name}.json").read_text()))
    assert outside(check_case(case)) == []


def copied(case: str, folder: Path) -> Path:
    fields = json.loads((FOLDER / f"{case}.json").read_text())
    for name in [f"{case}.json", f"{case}.safetensors", *fields.get("weights", [])]:
        shutil.copyfile(FOLDER / name, folder / name)
    return folder


@needs_vectors
@pytest.mark.parametrize(
    ("case", "tensor", "quantity"),
    [
        ("qwen3_dspark_gated", "output_hidden", "output states"),
        ("qwen3_dspark_vanilla", "confidence_pred", "confidence"),
        ("gemma4_dspark_vanilla", "draft_logsumexp", "logits"),
        ("qwen3_dflash", "grad.hidden_norm.weight", "gradients in full"),
        ("qwen3_eagle3", "step_hidden", "step states"),
        ("dspark_loss_only", "grad_logits.dspark", "dspark: gradients"),
    ],
)
def test_a_number_that_is_a_little_off_is_found_and_named(
    case: str, tensor: str, quantity: str, tmp_path: Path
) -> None:
    """The negative control: 1e-3 on one tensor of the case fails that quantity and no other."""
    copied(case, tmp_path)
    tensors = load_file(tmp_path / f"{case}.safetensors")
    tensors[tensor] = tensors[tensor] * 1.001
    save_file(tensors, tmp_path / f"{case}.safetensors")
    (checks,) = run_vectors(tmp_path).values()
    assert [check.quantity for check in outside(checks)] == [quantity]


@needs_vectors
def test_a_loss_term_or_gradient_norm_that_is_off_is_found(tmp_path: Path) -> None:
    copied("qwen3_dspark_vanilla", tmp_path)
    fields = json.loads((tmp_path / "qwen3_dspark_vanilla.json").read_text())
    fields["scalars"]["l1_loss_num"] *= 1.0001
    fields["grads"]["norms"]["fc.weight"] *= 1.001
    fields["grads"]["cos_projection"]["norm.weight"] += 0.01
    (tmp_path / "renamed.json").write_text(json.dumps(fields))
    shutil.move(tmp_path / "qwen3_dspark_vanilla.safetensors", tmp_path / "renamed.safetensors")
    (tmp_path / "qwen3_dspark_vanilla.json").unlink()
    (checks,) = run_vectors(tmp_path).values()
    assert [(check.quantity, check.note.split(" of ")[0]) for check in outside(checks)] == [
        ("loss terms", "tv numerator"),
        ("gradient norms", "fc.weight"),
        ("gradient projections", "norm.weight"),
    ]


@needs_vectors
def test_the_command_ends_with_1_where_a_case_is_outside(tmp_path: Path) -> None:
    copied("dspark_loss_only", tmp_path)
    assert CliRunner().invoke(app, [str(tmp_path)]).exit_code == 0
    tensors = load_file(tmp_path / "dspark_loss_only.safetensors")
    save_file(
        tensors | {"draft_logits": tensors["draft_logits"] + torch.eye(64)[0]},
        tmp_path / "dspark_loss_only.safetensors",
    )
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert result.exit_code == 1
    assert "OUTSIDE" in result.output


def test_a_folder_without_cases_and_a_kind_unknown_here_are_no_success(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no reference vectors"):
        read_cases(tmp_path)
    (tmp_path / "odd.json").write_text(json.dumps({"other": 1}))
    assert [check.quantity for check in outside(run_vectors(tmp_path)["odd"])] == ["kind of case"]
    with pytest.raises(DataError, match="a file of the case is missing"):
        check_case(Case(tmp_path / "odd.json", {"variants": {}}))


@pytest.mark.parametrize("decay", [4.0, None])
@pytest.mark.parametrize(
    ("name", "target"), [(n, t) for n in CONFIGS for t in TARGETS if n != "eagle3"]
)
def test_cases_of_other_heads_families_and_options_are_understood(
    name: str, target: str, decay: float | None, tmp_path: Path
) -> None:
    """Layer -1, block size 4, every head and none: nothing is special to the cases at hand."""
    draft = make_draft(CONFIGS[name], target=target)
    assert isinstance(draft, BlockDraft)
    write_block_case(draft, make_batch(), LossConfig(decay=decay), tmp_path)
    assert outside(run_vectors(tmp_path)["any"]) == []


@pytest.mark.parametrize("target", TARGETS)
def test_eagle3_cases_with_padded_rows_are_understood(target: str, tmp_path: Path) -> None:
    draft = make_draft(CONFIGS["eagle3"], target=target)
    assert isinstance(draft, Eagle3Draft)
    write_eagle3_case(draft, make_batch((14, 9)), tmp_path)
    assert outside(run_vectors(tmp_path)["any"]) == []
