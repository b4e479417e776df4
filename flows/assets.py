"""Lineage in Prefect: an artifact that a run seals is an asset there, materialized from the assets that it was made from.

The store holds the truth (`python -m deepspec lineage`). The server's events tell the same chain for whoever looks there,
and may start automations; those that it does not take are lost, and nothing else is.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prefect.assets import Asset, AssetProperties, add_asset_metadata, materialize
from prefect.cache_policies import NO_CACHE

from deepspec.artifact import Artifact
from deepspec.provenance import sealed_inputs
from flows.reporting import best_effort

log = logging.getLogger(__name__)

MAX_KEY = 512  # characters that Prefect allows


def publish_asset(artifact: Artifact) -> None:
    """Tell the server that the sealed artifact was made, from what, and how much it is."""
    key = asset_key(artifact.url)
    upstream = [asset_key(found.url) for found in sealed_inputs(artifact)]
    if max(map(len, (key, *upstream))) > MAX_KEY:
        log.warning("%s is no asset in Prefect: its URL is longer than %d characters", artifact.url, MAX_KEY)
        return
    asset = Asset(key=key, properties=AssetProperties(name=artifact.folder))
    publish = materialize(
        asset, by="deepspec", asset_deps=upstream, name="publish", task_run_name=f"publish {artifact.key.stage}",
        persist_result=False, cache_policy=NO_CACHE,
    )(add_asset_metadata)  # fmt: skip
    with best_effort():
        publish(key, metadata(artifact))


def asset_key(url: str) -> str:
    """An artifact's URL as Prefect takes it: a URI, also of a local folder, in which `=20` stands for a blank."""
    scheme, is_uri, rest = url.partition("://")
    uri = f"{scheme}://{quote(rest)}" if is_uri else Path(url).resolve().as_uri()
    return uri.replace("%", "=")  # Prefect refuses the usual sign


def metadata(artifact: Artifact) -> dict[str, Any]:
    """What identifies the artifact's content, and how much it is; no setting of the run."""
    info, manifest = artifact.info(), artifact.manifest()
    if info is None or manifest is None:
        return {}
    identity = {"stage": info.stage, "fingerprint": info.fingerprint, "digest": manifest.digest, "code_version": info.code_version}
    return {**identity, **manifest.totals}
