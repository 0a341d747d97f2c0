"""Sends metrics to Weights & Biases, online or offline."""

import sys
from pathlib import Path
from typing import Any

sys.modules.setdefault("numpy", None)  # type: ignore[arg-type] # optional for wandb, and a fifth of its imports

import wandb  # noqa: E402

from contracts.points import Point  # noqa: E402
from tracking.base import TrackedRun, axes  # noqa: E402
from tracking.wandb_files import ERROR, FATAL, first_error, steps_in  # noqa: E402

AXES = {"train/*": "global_step", "eval/*": "iteration", "data/*": "iteration", "system/*": "iteration"}
"""The axis by which each group of metrics is plotted; metrics of other trainings are plotted by their own step."""


class WandbTracker:
    """A wandb run. Its step is a point's index in metrics.jsonl, so wandb itself rejects points that it already has."""

    def __init__(self, run: TrackedRun, settings: dict[str, Any]) -> None:
        run.tracking_directory.mkdir(exist_ok=True)
        # This method reads inputs of wandb's launcher, which is not used here, and causes a third of wandb's imports.
        wandb.Run._detect_and_apply_job_inputs = lambda run: None  # type: ignore[method-assign]
        self._run = wandb.init(
            id=run.id,
            resume="allow",
            dir=str(run.tracking_directory),
            project=settings["project"],
            entity=settings["entity"],
            name=settings["name"] or run.name,
            group=settings["group"],
            tags=settings["tags"],
            mode=settings["mode"],
            config=run.config,
            # The stages run in other processes, so statistics of this one are of no use.
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                silent=True,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        for name in ("iteration", "global_step", "stage_step"):
            self._run.define_metric(name, hidden=True)
        for group, axis in AXES.items():
            self._run.define_metric(group, step_metric=axis)
        for group in ("sft/*", "reward-model/*", "critic/*"):
            self._run.define_metric(group, step_metric="stage_step")
        self._files = run.tracking_directory / "wandb" if settings["mode"] == "offline" else None
        self._logged: set[int] = set()
        local = max(self._written(), default=-1) + 1
        self._recorded: int = max(self._run.starting_step, local)  # `step` does not reflect the server's state yet

    def recorded(self) -> int:
        """The number of points on the server, or in the files of earlier commands."""
        return self._recorded

    def log(self, points: list[Point]) -> None:
        """Hand the points to wandb's own process, which sends them and retries."""
        for point in points:
            self._run.log({**point.metrics, **axes(point)}, step=point.point)
            self._logged.add(point.point)

    def close(self) -> None:
        """Wait until wandb's own process has sent or written everything.

        Raises:
            RuntimeError: it did not, for example because the key was revoked or the disk is full; `finish` does not
                report that.
        """
        self._run.finish()
        wandb.teardown()  # `finish` returns a moment before the last points of an offline run are written
        log = Path(self._run.settings.log_internal)
        if error := first_error(log, FATAL):
            raise RuntimeError(
                f"wandb has stopped sending: {error} (its log: {log}); if the server has refused the key, set a valid "
                "one in WANDB_API_KEY or by `wandb login`"
            )
        if self._files is not None and (missing := self._logged - self._written()):
            why = first_error(log, ERROR) or "it does not say why"
            raise RuntimeError(f"wandb has not written {len(missing)} of {len(self._logged)} points: {why} ({log})")

    def _written(self) -> set[int]:
        """The steps in the files of this and earlier commands; empty in online mode."""
        return set() if self._files is None else steps_in(self._files, self._run.id)
