"""What the Prefect server does by itself about runs of these flows; `python -m flows.setup`
installs it.
"""

from datetime import timedelta
from typing import Any

from flows.flow_stages import STAGES_OF

ENDS = ("Completed", "Failed", "Crashed", "Cancelled", "TimedOut")
SILENT_HEARTBEATS = 3  # with half as many, healthy runs were marked crashed
SILENCE_S = SILENT_HEARTBEATS * 180.0  # Prefect's own interval between two heartbeats
# Prefect calls a run late 15 s after it should have begun, looking every five
UNATTENDED_S, LATE_S = 60.0, 20.0
# Ends the name of a child run, for which no webhook is called: only for the run that started it.
PART = " (part)"
WEBHOOK_BLOCK = "deepspec-notify"
# Rendered by the server; tojson, because a name may hold quotes.
MESSAGE = (
    '{"text": {{ (flow_run.name ~ ": " ~ flow_run.state.name ~ " " ~ flow_run|ui_url) | tojson }}}'
)


def crashed(silence_s: float) -> Any:
    """An automation that marks a run as crashed which sent a heartbeat and then, for so long,
    neither another one nor its end.

    It changes the run's state and nothing else: a run that was only cut off from the server goes
    on, and its end replaces that state.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    message = (
        f"no sign of life for {silence_s:g} s: its process or machine is gone. "
        "Run it again: it does only what is missing."
    )
    trigger = EventTrigger(
        posture=Posture.Proactive,
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "flow", "prefect.resource.name": list(STAGES_OF)},
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{end}" for end in ENDS)},
        for_each={"prefect.resource.id"},
        threshold=1,
        within=timedelta(seconds=silence_s),
    )
    return AutomationCore(
        name="deepspec: mark runs crashed that died without a word",
        description=f"A run of these flows that is silent for {silence_s:g} s",
        trigger=trigger,
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=message)],
    )


def unattended(pool: str) -> Any:
    """An automation for a run that no worker of the pool takes for a minute: its state names the
    command that starts one.

    The run stays scheduled, under another state name, and the next worker that has room takes it.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    message = (
        f"no worker on the work pool {pool!r}, or all are busy: "
        f"start one with `prefect worker start --pool {pool}`"
    )
    trigger = EventTrigger(
        posture=Posture.Proactive,
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "work-pool", "prefect.resource.name": pool},
        after={"prefect.flow-run.Late"},
        expect={
            "prefect.flow-run.Pending",
            "prefect.flow-run.Running",
            "prefect.flow-run.Cancelling",
            *(f"prefect.flow-run.{end}" for end in ENDS),
        },
        for_each={"prefect.resource.id"},
        threshold=1,
        within=timedelta(seconds=UNATTENDED_S - LATE_S),
    )
    return AutomationCore(
        # `deployment run --watch` shows it
        name=f"deepspec: no worker on {pool}? prefect worker start --pool {pool}",
        description=f"A run that waits for a worker for {UNATTENDED_S:g} s",
        trigger=trigger,
        actions=[ChangeFlowRunState(name="NoWorker", state=StateType.SCHEDULED, message=message)],
    )


def ended(url: str) -> Any:
    """An automation that calls a webhook with how each run of a deployment ended, but not with its
    parts (subflows, groups of shards).

    The URL, which may hold a token, is kept in a Prefect block, encrypted there and shown nowhere.
    """
    from prefect.blocks.webhook import Webhook
    from prefect.events.actions import CallWebhook
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    block = Webhook(method="POST", url=url, headers={"Content-Type": "application/json"}).save(
        WEBHOOK_BLOCK, overwrite=True
    )
    trigger = EventTrigger(
        posture=Posture.Reactive,
        match={"prefect.resource.id": "prefect.flow-run.*", "prefect.resource.name": f"!*{PART}"},
        match_related=[
            {"prefect.resource.role": "flow", "prefect.resource.name": list(STAGES_OF)},
            {"prefect.resource.role": "deployment"},
        ],
        expect={f"prefect.flow-run.{end}" for end in ENDS if end != "Cancelled"},
        for_each={"prefect.resource.id"},
        threshold=1,
        within=timedelta(0),
    )
    return AutomationCore(
        name="deepspec: tell a webhook how runs ended",
        description="Each run of a deployment that finished, failed or crashed",
        trigger=trigger,
        actions=[CallWebhook(block_document_id=block, payload=MESSAGE)],
    )
