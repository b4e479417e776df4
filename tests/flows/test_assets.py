"""The server's events hold the same chain as the store, and nothing that is secret."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import chain, input_artifact
from deepspec.artifacts.records import ArtifactInput
from deepspec.artifacts.run import Run
from deepspec.artifacts.stages import STAGES
from deepspec.config.recipes import load_run
from deepspec.config.run import RunConfig
from flows import assets
from flows.assets import MATERIALIZED, asset_key, publish_asset, publish_once
from tests.conftest import tiny_run
from tests.flows.test_tasks import prompts_and_answers


@flow
def publish_all(artifacts: list[Artifact]) -> None:
    for artifact in artifacts:
        publish_asset(artifact)


@flow
def publish_all_once(artifacts: list[Artifact]) -> None:
    for artifact in artifacts:
        publish_once(artifact)


def event_of(key: str, *, seconds: float = 60) -> dict[str, Any]:
    """The asset's newest materialization that the server knows; events take a moment to get
    there.
    """
    limit = time.monotonic() + seconds
    while not (found := events_of(key)):
        assert time.monotonic() < limit, f"the server knows nothing of {key}"
        time.sleep(0.2)
    return dict(found[0])


def events_of(key: str) -> list[dict[str, Any]]:
    wanted = {"event": {"name": [MATERIALIZED]}, "resource": {"id": [key]}, "order": "DESC"}
    with get_client(sync_client=True) as client:
        return list(
            client.request("POST", "/events/filter", json={"filter": wanted}).json()["events"]
        )


def inputs_in(event: dict[str, Any]) -> set[str]:
    return {
        one["prefect.resource.id"]
        for one in event["related"]
        if one["prefect.resource.role"] == "asset"
    }


def chain_on_server(key: str) -> dict[str, set[str]]:
    """Each asset upstream of this one, this one included, with those that it was made from."""
    found, todo = dict[str, set[str]](), [key]
    while todo:
        if (one := todo.pop()) not in found:
            found[one] = inputs_in(event_of(one))
            todo += found[one]
    return found


def chain_in_store(artifact: Artifact) -> dict[str, set[str]]:
    def key(entry: ArtifactInput) -> str:
        return asset_key(input_artifact(artifact.store, entry).url)

    return {
        key(ArtifactInput.model_validate(found.model_dump())): {
            key(entry) for entry in found.inputs
        }
        for _, _, found in chain(artifact)
    }


def sealed(config: RunConfig, *stages: str) -> list[Artifact]:
    """The stages' artifacts, sealed with nothing in them."""
    artifacts = [Run(config).artifact(stage) for stage in stages]
    for artifact in artifacts:
        artifact.create(config.model_dump(mode="json"))
        artifact.seal(inputs={})
    return artifacts


def test_the_servers_events_and_the_store_tell_the_same_chain(tmp_path: Path):
    config = tiny_run(tmp_path / "a store")
    artifacts = sealed(config, *[stage.name for stage in Run(config).stages])
    publish_all(artifacts)
    result = artifacts[-1]
    on_server = chain_on_server(asset_key(result.url))
    assert on_server == chain_in_store(result)
    assert len(on_server) == 6 and "/a=20store/evaluate/" in asset_key(result.url)
    payload = event_of(asset_key(result.url))["payload"]
    assert (
        payload["digest"] == result.manifest().digest
        and payload["fingerprint"] == result.key.fingerprint
    )
    assert {"rows", "tokens", "shards", "num_bytes", "rejected"} < set(payload)


def test_what_a_server_does_not_know_is_told_once_with_the_first_thing_that_was_made_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stages that were made by hand or with another server had no event, and a known benchmark
    never had one.
    """
    config = tiny_run(tmp_path / "store", "evaluate.benchmarks=[{name: gsm8k}]")
    result = Run(config).artifact("evaluate")
    (benchmark,) = [entry for entry in result.key.inputs if entry.stage == "benchmarks"]
    read = input_artifact(result.store, benchmark)
    read.create({})
    read.seal(inputs={})
    sealed(config, *[stage.name for stage in Run(config).stages])
    publish_all([result])
    assert chain_on_server(asset_key(result.url)) == chain_in_store(result)
    assert asset_key(read.url) in inputs_in(event_of(asset_key(result.url)))
    monkeypatch.setattr(assets, "_published", set())  # as in another process
    publish_all_once([result])
    assert len(events_of(asset_key(result.url))) == 1


def test_hidden_states_that_training_made_are_passed_over(tmp_path: Path):
    config = tiny_run(tmp_path / "store")
    Run(config).artifact("hidden").create({})
    *_, draft = artifacts = sealed(config, "demo", "prompts", "answers", "train")
    publish_all(artifacts)
    made_from = {
        asset_key(Run(config).artifact(stage).url) for stage in STAGES["hidden"].reads(config)
    }
    assert inputs_in(event_of(asset_key(draft.url))) == made_from


@pytest.mark.slow
def test_a_stage_that_a_flow_seals_is_an_asset_and_nothing_of_the_run_is_told(run_file: Path):
    prompts_and_answers(str(run_file))
    answers = Run(load_run(str(run_file))).artifact("answers")
    event = event_of(asset_key(answers.url))
    assert inputs_in(event) == {asset_key(Run(load_run(str(run_file))).artifact("prompts").url)}
    assert (event["payload"]["shards"], event["payload"]["rows"]) == (6, 12)
    assert "flow-run" in {one["prefect.resource.role"] for one in event["related"]}
    assert "resources" not in json.dumps(event) and "endpoint" not in json.dumps(event)


def test_a_server_that_is_away_costs_the_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (prompts,) = sealed(tiny_run(tmp_path), "demo")

    @flow
    def away() -> str:
        with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
            publish_asset(prompts)
        return "went on"

    assert away() == "went on"


def test_an_url_that_prefect_does_not_take_is_said_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (demo,) = sealed(tiny_run(tmp_path.joinpath(*["x" * 100] * 6)), "demo")
    publish_all([demo])
    assert "is no asset in Prefect" in caplog.text


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("/data/my store/answers/x-1a", "file:///data/my=20store/answers/x-1a"),
        ("file:///data/store/answers/x-1a", "file:///data/store/answers/x-1a"),
        ("s3://bucket/a[1]%20/answers/x-1a", "s3://bucket/a=5B1=5D=2520/answers/x-1a"),
    ],
)
def test_a_key_is_the_artifacts_url_in_the_characters_that_prefect_allows(url: str, key: str):
    assert asset_key(url) == key
