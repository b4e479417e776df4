"""A cache that is not the run's is refused before a weight is loaded, and every field that
differs is named with both values.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.cache.reader import HiddenCache
from deepspec.errors import ArtifactMismatch
from deepspec.storage.store import file_checksum
from deepspec.train import draft_artifact as drafts
from deepspec.train.cache_check import check_cache
from deepspec.train.loop import run_train
from tests.conftest import tiny_run


@pytest.fixture
def ready(captured: Path, tmp_path: Path) -> Path:
    shutil.copytree(captured, tmp_path / "ready")
    return tmp_path / "ready"


def path(artifact: Artifact, name: str) -> Path:
    return Path(artifact.store.path(artifact.path(name)))


def test_the_cache_of_the_run_passes(captured: Path):
    config = tiny_run(captured)
    check_cache(Run(config), HiddenCache(Run(config).artifact("hidden")))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "target.layer_ids=[-1, 1, 2]",
            "target.layer_ids is [-1, 0, 2] in its artifact.json, [-1, 1, 2] in this run",
        ),
        (
            "target.dtype=bfloat16",
            "target.dtype is float32 in its artifact.json, bfloat16 in this run",
        ),
        ("hidden.codec=int8", "hidden.codec is raw in its artifact.json, int8 in this run"),
        (
            "hidden.last_hidden=none",
            "hidden.last_hidden is supervised in its artifact.json, none in this run",
        ),
        ("hidden.max_length=100", "hidden.max_length is 512 in its artifact.json, 100 in this run"),
        ("answers.max_new_tokens=11", "the input is ['answers/demo-"),
    ],
)
def test_a_cache_that_was_copied_to_another_runs_place_is_refused(
    ready: Path, monkeypatch: pytest.MonkeyPatch, override: str, said: str
):
    monkeypatch.setattr(drafts, "load_file", lambda *_: pytest.fail("a weight was loaded"))
    dflash = (
        ["loss.tv=0", "draft.markov=null", "draft.confidence=null", "draft.algorithm=dflash"]
        if "none" in override
        else []
    )
    other = tiny_run(ready, override, *dflash)
    shutil.copytree(
        path(Run(tiny_run(ready)).artifact("hidden"), ""), path(Run(other).artifact("hidden"), "")
    )
    with pytest.raises(ArtifactMismatch, match="the cache is not that of this run") as refused:
        run_train(Run(other))
    assert said in refused.value.what
    assert refused.value.where == Run(other).artifact("hidden").url
    assert "hidden" in refused.value.fix


def reseal(artifact: Artifact, name: str) -> None:
    """What somebody does who edits a file and the manifest with it, or another version that
    writes it so.
    """
    manifest = path(artifact, "manifest.json")
    told = json.loads(manifest.read_text())
    told["files"][name] = {
        "num_bytes": path(artifact, name).stat().st_size,
        "checksum": file_checksum(path(artifact, name)),
    }
    manifest.write_text(json.dumps(told))


def in_schema(**changes: str) -> Callable[[Artifact], None]:
    def change(artifact: Artifact) -> None:
        file = path(artifact, "schema.arrow")
        schema = pa.ipc.read_schema(pa.py_buffer(file.read_bytes()))
        file.write_bytes(
            schema.with_metadata(
                {**schema.metadata, **{key.encode(): value for key, value in changes.items()}}
            )
            .serialize()
            .to_pybytes()
        )
        reseal(artifact, "schema.arrow")

    return change


def in_config(**changes: int) -> Callable[[Artifact], None]:
    def change(artifact: Artifact) -> None:
        file = path(artifact, "target/config.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def smaller_lm_head(artifact: Artifact) -> None:
    tensors = {"embed_tokens.weight": torch.zeros(512, 32), "lm_head.weight": torch.zeros(500, 32)}
    save_file(tensors, path(artifact, "frozen.safetensors"))
    reseal(artifact, "frozen.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (in_schema(target="other"), "target.model is other in its schema.arrow, demo in this run"),
        (
            in_schema(layers="[-1, 1, 2]"),
            "target.layer_ids is [-1, 1, 2] in its schema.arrow, [-1, 0, 2] in this run",
        ),
        (in_schema(tokenizer_digest="0123"), "tokenizer_digest is 0123 in its schema.arrow, "),
        (
            in_schema(chat_template_digest="0123"),
            "chat_template_digest is 0123 in its schema.arrow, ",
        ),
        (
            in_config(hidden_size=64),
            "hidden_size of context is 32 in its schema.arrow, 64 in its target/config.json",
        ),
        (in_config(vocab_size=600), "vocab_size is 600 in its target/config.json, 512 in this run"),
        (
            in_config(num_hidden_layers=5),
            "num_hidden_layers is 5 in its target/config.json, 4 in this run",
        ),
        (
            smaller_lm_head,
            "shape of lm_head.weight is [500, 32] in its frozen.safetensors, "
            "[512, 32] in its target/config.json",
        ),
        (
            lambda artifact: path(artifact, "artifact.json").unlink(),
            "the recipe is missing in its artifact.json",
        ),
    ],
)
def test_a_cache_that_was_edited_is_refused(
    ready: Path, change: Callable[[Artifact], None], said: str
):
    config = tiny_run(ready)
    change(Run(config).artifact("hidden"))
    with pytest.raises(ArtifactMismatch) as refused:
        check_cache(Run(config), HiddenCache(Run(config).artifact("hidden")))
    assert said in refused.value.what


def test_all_that_differs_is_said_at_once_and_nothing_twice(ready: Path):
    other = tiny_run(ready, "target.layer_ids=[-1, 1, 2]", "hidden.codec=int8")
    shutil.copytree(
        path(Run(tiny_run(ready)).artifact("hidden"), ""), path(Run(other).artifact("hidden"), "")
    )
    with pytest.raises(ArtifactMismatch) as refused:
        check_cache(Run(other), HiddenCache(Run(other).artifact("hidden")))
    assert [
        refused.value.what.count(f"{field} is") for field in ("target.layer_ids", "hidden.codec")
    ] == [1, 1]
