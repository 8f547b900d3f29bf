"""The last task of a run that is not the last of its fine-tune: submits the next run, from inside the cluster.

A failed run never comes to it, so a failure stops the chain.
"""

from typing import Any

from kfp import dsl


@dsl.component(base_image="grpo-pipeline/cpu-python", install_kfp_package=False)
def submit_next(settings: str, cluster: str, remaining: int, run: str, job_id: str, decision: dsl.Input[dsl.Artifact]):
    """Submits the run that goes on from this one's checkpoint."""
    from pipeline.chain import go_on

    go_on(settings, cluster, remaining, run or job_id, job_id)


def go_on(settings: str, cluster: str, remaining: int, run: str, job_id: str) -> str:
    """Starts the next run of the chain with what remains; gives its id. Done again, it starts no second one.

    settings: this run's settings as configure resolved them, as JSON. cluster: the `[cluster]` section as JSON, images
    included. remaining: iterations still to do. run: name of this run; job_id: its id. What its form said of pods holds
    for the next run too.

    Raises:
        ClusterError: the pod may not submit; `k8s/base` has the Role it needs.
    """
    import json

    from components.common.settings import validate
    from pipeline.connection import call
    from pipeline.resources import ClusterSettings, with_form
    from pipeline.settings import PipelineSettings
    from pipeline.submitting import GO_ON, given_to, start, upload

    client = connect()
    given = given_to(call("read this run", client.get_run, job_id))
    pods = with_form(validate(ClusterSettings, json.loads(cluster), where="cluster"), given)
    start_here = {"start_run": run.lower()}  # as configure writes it
    values = json.loads(settings) | GO_ON | start_here | {"cluster": pods.model_dump(), "iterations": remaining}
    following = validate(PipelineSettings, values, where="next run")
    submitted = start(client, following, upload(client, following), f"{following.fine_tune}-after-{run.lower()}")
    print(f"{remaining} iterations remain: submitted {submitted.name} {submitted.url}")
    return submitted.run_id


def connect() -> Any:
    """The client of the pod's own cluster."""
    from pipeline.connection import Connection

    return Connection().open()
