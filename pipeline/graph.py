"""The pipeline: which stage follows which. Compiled for the cluster or run here, the same graph.

    configure → dataset → ┌ rollout → reward → update ┐ … → rollout → reward → evaluate → publish
                          └────────────→ evaluate     ┘

KFP has no loop, so the iterations are unrolled when the graph is built.
"""

import inspect
from typing import Any

from kfp import dsl

from components.configure.component import configure
from components.configure.config import RunSettings
from components.configure.form import form_fields
from components.configure.pods import PodField, pod_fields
from components.dataset.component import dataset
from components.evaluate.component import evaluate
from components.publish.component import publish
from components.reward.component import reward, reward_shards
from components.rollout.component import rollout
from components.update.component import update
from pipeline import resources
from pipeline.chain import submit_next
from pipeline.images import image_of, pinned
from pipeline.settings import PipelineSettings


def build(settings: PipelineSettings, *, on_cluster: bool, remaining: int = 0) -> Any:
    """The KFP pipeline of these settings; its parameters are the settings' form, its defaults their values.

    With `remaining` iterations for later runs, a last task submits the next one.

    Raises:
        SettingsError: on a cluster, when a stage has no image.
    """
    if on_cluster:
        settings = settings.model_copy(update={"cluster": pinned(settings.cluster)})
    values = settings.model_dump(mode="json")
    fields = list(form_fields(RunSettings))
    pods = _pods(settings) if on_cluster else {}
    parameters = [inspect.Parameter("run", inspect.Parameter.POSITIONAL_OR_KEYWORD, default="", annotation=str)]
    parameters += [
        inspect.Parameter(
            field.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=field.default(values), annotation=field.kind
        )
        for field in fields
    ]
    parameters += [
        inspect.Parameter(field.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value, annotation=field.kind)
        for field, value in pods.items()
    ]

    def graph(*arguments: Any) -> None:
        run, *form = arguments
        values = dict(zip((field.name for field in (*fields, *pods)), form, strict=True))
        _Graph(settings, run, values, on_cluster, remaining).draw()

    graph.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    graph.__doc__ = _description(settings, [*fields, *pods])
    return dsl.pipeline(name=f"grpo-{settings.fine_tune}")(graph)


def _pods(settings: PipelineSettings) -> dict[PodField, Any]:
    """The form's fields of pods, with the settings' values."""
    values = {
        (stage, name): value
        for stage in resources.FORM_STAGES
        for name, value in resources.form_of(settings.cluster, stage, nodes=settings.update.nodes).items()
    }
    return {
        field: values[field.stage, field.setting] for field in pod_fields() if (field.stage, field.setting) in values
    }


def _description(settings: PipelineSettings, fields: list[Any]) -> str:
    head = f"GRPO fine-tune {settings.fine_tune}: {settings.iterations} iterations from {settings.model}."
    lines = [f"    {field.name}: {' '.join(field.description.split())}" for field in fields]
    return "\n".join([head, "", "Args:", "    run: Name of the run; blank: the id Kubeflow gives it.", *lines])


class _Graph:
    """Draws the tasks of one run."""

    def __init__(
        self, settings: PipelineSettings, run: Any, form: dict[str, Any], on_cluster: bool, remaining: int
    ) -> None:
        self.settings = settings
        self.remaining = remaining
        self.on_cluster = on_cluster
        self.run = run
        self.form = form

    def draw(self) -> None:
        begin = self._configure()
        self.begin = begin
        found = self._name(
            dataset(settings=begin.outputs["dataset_settings"], policy=begin.outputs["policy"]), "dataset"
        )
        self.prompts = found.outputs["prompts"]
        if not self.settings.skip_unchanged_data:
            self._iterate()
            return
        with dsl.If(found.outputs["Output"] == "new", name="data has changed"):
            self._iterate()

    def _iterate(self) -> None:
        begin = self.begin
        policies, optimizer = [begin.outputs["policy"]], begin.outputs["optimizer"]
        history = begin.outputs["history"]
        num_evaluated, behind = 0, self.settings.staleness
        for iteration in range(self.settings.iterations):
            sampled = max(0, iteration - behind)  # the policy that is sampled, counted like iterations
            scored = self._sample_and_score(iteration, policies[sampled])
            updated = self._update(iteration, policies[-1], optimizer, scored)
            if sampled == num_evaluated:  # with staleness 1 the start policy is sampled twice
                evaluated = self._evaluate(sampled, policies[sampled], scored, history)
                history, num_evaluated = evaluated.outputs["evaluation"], num_evaluated + 1
                if not self.on_cluster:  # here one task runs at a time: the evaluation first, which one wants to see
                    updated.after(evaluated)
            policies.append(updated.outputs["next_policy"])
            optimizer = updated.outputs["next_optimizer"]
        for sampled in range(num_evaluated, len(policies)):  # those no update learns from
            scored = self._sample_and_score(sampled + behind, policies[sampled])
            history = self._evaluate(sampled, policies[sampled], scored, history).outputs["evaluation"]
        decision = publish(settings=begin.outputs["publish_settings"], policy=policies[-1], evaluation=history)
        self._name(decision, "publish")
        if self.remaining:
            self._submit_next(decision.outputs["decision"])

    def _pod_of(self, stage: str) -> dict[str, Any]:
        """Parameters that a stage's pod is made of, by setting."""
        known = [field for field in pod_fields() if field.stage == stage and field.name in self.form]
        return {field.setting: self.form[field.name] for field in known}

    def _without_gpus(self) -> dict[str, Any]:
        """What configure is told of pods whose form has no field for GPUs."""
        stages = [stage for stage in resources.FORM_STAGES if self._pod_of(stage) and "gpus" not in self._pod_of(stage)]
        told = {"gpus": "0", "gpu_resource": "none"}
        fields = (field for field in pod_fields() if field.stage in stages and field.setting in told)
        return {field.name: told[field.setting] for field in fields}

    def _configure(self) -> Any:
        return self._name(
            configure(
                settings=self.settings.model_dump_json(),
                run=self.run,
                job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
                **self.form,
                **self._without_gpus(),
            ),
            "configure",
        )

    def _sample_and_score(self, iteration: int, policy: Any) -> Any:
        inputs = {
            "settings": self.begin.outputs["rollout_settings"],
            "iteration": iteration,
            "policy": policy,
            "prompts": self.prompts,
        }
        reward_settings = self.begin.outputs["reward_settings"]
        if self.settings.shards == 1:
            sampled = self._name(rollout(shard=0, **inputs), f"rollout {iteration}")
            task = reward(settings=reward_settings, completions=sampled.outputs["completions"])
        else:
            with dsl.ParallelFor(items=list(range(self.settings.shards)), name=f"shards {iteration}") as shard:
                sampled = self._name(rollout(shard=shard, **inputs), f"rollout {iteration}")
            task = reward_shards(
                settings=reward_settings,
                completions=dsl.Collected(sampled.outputs["completions"]),
            )
        return self._name(task, f"reward {iteration}").outputs["scored"]

    def _update(self, iteration: int, policy: Any, optimizer: Any, scored: Any) -> Any:
        task = update(
            settings=self.begin.outputs["update_settings"],
            iteration=iteration,
            policy=policy,
            optimizer=optimizer,
            reference=self.begin.outputs["reference"],
            scored=scored,
        )
        return self._name(task, f"update {iteration}")

    def _evaluate(self, iteration: int, policy: Any, scored: Any, history: Any) -> Any:
        task = evaluate(
            settings=self.begin.outputs["evaluate_settings"],
            iteration=iteration,
            policy=policy,
            scored=scored,
            history=history,
        )
        return self._name(task, f"evaluate {iteration}")

    def _submit_next(self, decision: Any) -> None:
        task = submit_next(
            settings=self.begin.outputs["run_settings"],
            cluster=self.settings.cluster.model_dump_json(),
            remaining=self.remaining,
            run=self.run,
            job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            decision=decision,
        )
        self._name(task, "publish", display_name="submit next")

    def _name(self, task: Any, name: str, *, display_name: str | None = None) -> Any:
        """Named in the UI's graph. Results are reused by our own keys, which check that the bytes are still there."""
        task.set_display_name(display_name or name)
        task.set_caching_options(False)
        if self.on_cluster:
            stage, cluster = name.split()[0], self.settings.cluster
            image = image_of(stage, cluster)
            if stage == "update" and self.settings.update.nodes > 1:
                cluster, image = resources.following(cluster, image), image_of("configure", cluster)
            resources.apply(task, stage, cluster, image, self._pod_of(stage))
        return task
