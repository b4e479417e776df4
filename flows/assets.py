"""Lineage in Prefect: an artifact that a run seals is an asset there, materialized from the assets
that it was made from.

The store holds the truth (`python -m deepspec lineage`). The server's events repeat the same chain
for its users, and may start automations. What a server does not know yet (made by hand, with
another server, or while this one was away) is published by the next run that finds it, or that
seals something made from it.
"""

import logging
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prefect.assets import Asset, AssetProperties, add_asset_metadata, materialize
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import sealed_inputs
from flows.reporting import best_effort

log = logging.getLogger(__name__)

MATERIALIZED = "prefect.asset.materialization.succeeded"
# server, URL and digest of what this process published: an event takes seconds until it is found
_published: set[tuple[str, str, str]] = set()
MAX_KEY = 512  # characters that Prefect allows


def publish_once(artifact: Artifact) -> None:
    """The server knows this sealed artifact, as it is now, and all that it was made from."""
    with best_effort():
        if not _is_known(artifact):
            publish_asset(artifact)


def publish_asset(artifact: Artifact) -> None:
    """Publish that the sealed artifact was made, from what, and how much it is; before it, those of
    its inputs that the server does not know.
    """
    inputs = list(sealed_inputs(artifact))
    for upstream_artifact in inputs:
        publish_once(upstream_artifact)
    key = asset_key(artifact.url)
    upstream = [asset_key(found.url) for found in inputs]
    if max(map(len, (key, *upstream))) > MAX_KEY:
        log.warning(
            "%s is no asset in Prefect: its URL is longer than %d characters", artifact.url, MAX_KEY
        )
        return
    asset = Asset(key=key, properties=AssetProperties(name=artifact.folder))
    publish = materialize(
        asset,
        by="deepspec",
        asset_deps=upstream,
        name="publish",
        task_run_name=f"publish {artifact.key.stage}",
        persist_result=False,
        cache_policy=NO_CACHE,
    )(add_asset_metadata)
    with best_effort():
        publish(key, metadata(artifact))
        _published.add(_content(artifact))


def _is_known(artifact: Artifact) -> bool:
    """Whether an artifact of this URL and content was published, by this process or, as far back
    as events are kept, by any.
    """
    server, url, digest = _content(artifact)
    if (server, url, digest) in _published:
        return True
    wanted = {
        "event": {"name": [MATERIALIZED]},
        "resource": {"id": [asset_key(url)]},
        "order": "DESC",
    }
    with get_client(sync_client=True) as client:
        answer = client.request("POST", "/events/filter", json={"filter": wanted, "limit": 1})
    found = answer.json()["events"]
    return bool(found) and found[0]["payload"].get("digest") == digest


def _content(artifact: Artifact) -> tuple[str, str, str]:
    manifest = artifact.manifest()
    return str(PREFECT_API_URL.value()), artifact.url, manifest.digest if manifest else ""


def asset_key(url: str) -> str:
    """An artifact's URL as Prefect accepts it: a URI, also of a local folder, with `=20` for a
    blank.
    """
    scheme, is_uri, rest = url.partition("://")
    uri = f"{scheme}://{quote(rest)}" if is_uri else Path(url).resolve().as_uri()
    return uri.replace("%", "=")  # Prefect refuses the usual sign


def metadata(artifact: Artifact) -> dict[str, Any]:
    """What identifies the artifact's content, and how much it is; no setting of the run."""
    info, manifest = artifact.info(), artifact.manifest()
    if info is None or manifest is None:
        return {}
    identity = {
        "stage": info.stage,
        "fingerprint": info.fingerprint,
        "digest": manifest.digest,
        "code_version": info.code_version,
    }
    return {**identity, **manifest.totals}
