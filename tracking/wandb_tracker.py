"""Weights & Biases, online or offline."""

import wandb

from contracts.points import Point
from tracking.base import TrackedRun, axes
from tracking.config import WandbSettings
from tracking.wandb_files import last_step

AXES = {"train/*": "global_step", "eval/*": "iteration", "data/*": "iteration", "system/*": "iteration"}
"""What metrics are plotted by, group by group; those of other trainings by the step of theirs."""


class WandbTracker:
    """A run of wandb. Its step is the place of a point in the stream, so wandb itself refuses what it has."""

    def __init__(self, run: TrackedRun, settings: WandbSettings) -> None:
        run.own.mkdir(exist_ok=True)
        self._run = wandb.init(
            id=run.id,
            resume="allow",
            dir=str(run.own),
            project=settings.project,
            entity=settings.entity,
            name=settings.name or run.name,
            group=settings.group,
            tags=settings.tags,
            mode=settings.mode,
            config=run.config,
            # The stages run elsewhere: nothing of this process is worth to be watched.
            settings=wandb.Settings(
                console="off", x_disable_stats=True, disable_code=True, disable_git=True, silent=True
            ),
        )
        for name in ("iteration", "global_step", "stage_step"):
            self._run.define_metric(name, hidden=True)
        for group, axis in AXES.items():
            self._run.define_metric(group, step_metric=axis)
        for group in ("sft/*", "reward-model/*", "critic/*"):
            self._run.define_metric(group, step_metric="stage_step")
        local = last_step(run.own / "wandb", run.id) + 1 if settings.mode == "offline" else 0
        self._recorded: int = max(self._run.step, local)

    def recorded(self) -> int:
        """What the server says, or the files of earlier commands."""
        return self._recorded

    def log(self, points: list[Point]) -> None:
        """Hand the points to wandb's own process, which sends them and tries again."""
        for point in points:
            self._run.log({**point.metrics, **axes(point)}, step=point.point)

    def close(self) -> None:
        """Wait until wandb's own process has sent everything."""
        self._run.finish()
