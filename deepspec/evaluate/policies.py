"""Where confidence meets a run: what cuts blocks while it decodes, and what its rounds show of
confidence afterwards.
"""

import logging
from collections.abc import Callable

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import Stored
from deepspec.artifacts.results import CurvePoints
from deepspec.config.evaluate import EvaluateConfig
from deepspec.evaluate.calibration import Calibration
from deepspec.evaluate.scheduler import Policy, Scheduled, Threshold
from deepspec.evaluate.speed_curve import SpeedCurve
from deepspec.storage.store import pretty_json

log = logging.getLogger(__name__)

POLICY = "policy.json"
CALIBRATION = "calibration.json"  # of a result, and alongside the draft that it was fitted for


class PolicyInputs(Stored):
    """`policy.json` of a result: what its blocks are cut by, so that a resumed run cuts alike.

    Of a `calibration.json` it has the temperatures.
    """

    temperatures: list[float] | None
    curve: CurvePoints | None = None


def live_policy(
    settings: EvaluateConfig, artifact: Artifact, draft: Artifact, curve: Callable[[], SpeedCurve]
) -> Policy | None:
    """What cuts the blocks of this result: temperatures and curve are those of its first start.

    None cuts nothing. `curve` is called only where one is needed and not stored yet.
    """
    if settings.verify == "full":
        return None
    inputs = artifact.document(POLICY, PolicyInputs)
    if inputs is None:
        inputs = draft.document(f"draft/{CALIBRATION}", PolicyInputs)
        if inputs is None:
            fix = "an evaluation with evaluate.verify=full does that"
            log.warning("stage=evaluate the draft's confidence is not calibrated: %s", fix)
            inputs = PolicyInputs(temperatures=None)
        if settings.verify == "scheduled":
            inputs = inputs.model_copy(update={"curve": curve().points()})
        if not artifact.store.write_new(artifact.path(POLICY), pretty_json(inputs.model_dump())):
            # Another worker was first, and its curve is that of all.
            inputs = artifact.document(POLICY, PolicyInputs) or inputs
    if settings.verify == "threshold":
        return Threshold(settings.threshold, inputs.temperatures)
    points = inputs.curve or curve().points()
    return Scheduled(SpeedCurve(**dict(points), where=POLICY), inputs.temperatures)


def put_calibration(calibration: Calibration, artifact: Artifact, draft: Artifact) -> None:
    """Write the calibration into the result, and alongside the draft for exports and policies."""
    content = pretty_json(calibration.model_dump())
    artifact.write(CALIBRATION, content)
    draft.write(f"draft/{CALIBRATION}", content)
