"""Where confidence meets a run: what cuts blocks while it decodes, and what its rounds say
about confidence afterwards.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspec.artifacts.artifact import Artifact
from deepspec.config.run import RunConfig
from deepspec.evaluate.calibration import calibration_summary, fit_calibration
from deepspec.evaluate.scheduler import Policy, make_policy
from deepspec.evaluate.simulate import scheduler_summary
from deepspec.evaluate.speed_curve import SpeedCurve, profile, read_curve
from deepspec.evaluate.units import Models
from deepspec.storage.store import pretty_json
from deepspec.target.model import Target

log = logging.getLogger(__name__)

# of a result: what its blocks are cut by, so that a run that goes on cuts them alike
POLICY = "policy.json"
CALIBRATION = "calibration.json"  # of a result, and beside the draft that it was fitted for


def live_policy(
    config: RunConfig, artifact: Artifact, draft: Artifact, models: Models
) -> Policy | None:
    """What cuts the blocks of this result: temperatures and curve are those of its first start.
    None cuts nothing.
    """
    settings = config.evaluate
    if settings.verify == "full":
        return None
    fields = _read_json(artifact, POLICY)
    if fields is None:
        calibration = _read_json(draft, f"draft/{CALIBRATION}")
        if calibration is None:
            log.warning(
                "stage=evaluate the draft's confidence is not calibrated: an evaluation with evaluate.verify=full does that"
            )
        curve = speed_curve(config, models).to_json() if settings.verify == "scheduled" else None
        fields = {"temperatures": calibration and calibration["temperatures"], "curve": curve}
        if not artifact.store.write_new(artifact.path(POLICY), pretty_json(fields)):
            # another worker was first, and its curve stands for all
            fields = _read_json(artifact, POLICY) or fields
    curve_of = SpeedCurve(**fields["curve"], where=POLICY) if fields["curve"] else None
    return make_policy(settings, temperatures=fields["temperatures"], curve=curve_of)


def confidence_sections(
    config: RunConfig,
    artifact: Artifact,
    draft: Artifact,
    rows: Sequence[Mapping[str, Any]],
    models: Models,
) -> dict[str, Any]:
    """What a result's summary says of confidence and of the scheduler, and its calibration, put
    beside the draft as well.

    Only of blocks that were verified whole: of those that were cut nobody knows what the target
    thinks of the rest.
    """
    block_size = models.draft.block_size
    if config.evaluate.verify != "full" or (fitted := fit_calibration(rows, block_size)) is None:
        return {}
    content = pretty_json(fitted.to_json())
    artifact.store.write(artifact.path(CALIBRATION), content)
    draft.store.write(draft.path(f"draft/{CALIBRATION}"), content)
    curve = speed_curve(config, models)
    found = {
        "calibration": calibration_summary(rows, block_size),
        "scheduler": scheduler_summary(rows, block_size, curve, fitted.temperatures),
    }
    return {
        name: {**section, **_made_with(name, curve)} for name, section in found.items() if section
    }


def _made_with(name: str, curve: SpeedCurve) -> dict[str, Any]:
    return {"curve": curve.to_json()} if name == "scheduler" else {}


def speed_curve(config: RunConfig, models: Models) -> SpeedCurve:
    """`resources.devices.speed_curve`, or what this machine does with the target."""
    target: Target = models.target
    return given_curve(config) or profile(target, block_size=models.draft.block_size)


def given_curve(config: RunConfig) -> SpeedCurve | None:
    """The curve in the file `resources.devices.speed_curve`, where one is named.

    Raises:
        DataError: no such file, or no curve in it.
    """
    return (
        read_curve(Path(config.resources.devices.speed_curve))
        if config.resources.devices.speed_curve
        else None
    )


def _read_json(artifact: Artifact, name: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(artifact.store.read(artifact.path(name))))
    except FileNotFoundError:
        return None
