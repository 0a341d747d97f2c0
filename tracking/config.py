"""The config sections of the trackers."""

from pathlib import Path
from typing import Literal

from contracts.config import Section, runtime


class WandbSettings(Section):
    """Weights & Biases. Its key is taken from WANDB_API_KEY or ~/.netrc, where `wandb login` puts it."""

    project: str = runtime("ratchet")
    """The project."""
    entity: str | None = runtime(None)
    """The user or team; by default the one that the key belongs to."""
    name: str | None = runtime(None)
    """The run's name in the tracker; by default the name of its directory."""
    group: str | None = runtime(None)
    """The group in the tracker that the run belongs to."""
    tags: list[str] = runtime([])
    """Tags of the run."""
    mode: Literal["online", "offline"] = runtime("online")
    """offline: write files that `wandb sync` uploads later."""


class TrackioSettings(Section):
    """trackio: a local database, viewed with `trackio show`, or a Space of the Hub."""

    project: str = runtime("ratchet")
    """The project."""
    name: str | None = runtime(None)
    """The run's name in the tracker; by default the name of its directory, a hyphen and the run's id."""
    group: str | None = runtime(None)
    """The group in the tracker that the run belongs to."""
    space_id: str | None = runtime(None)
    """The Space that metrics are sent to (ORG/NAME), with the usual token of the Hub."""
    directory: Path | None = runtime(None)
    """The directory of the local database; by default TRACKIO_DIR, or trackio's own default."""


class TensorboardSettings(Section):
    """TensorBoard. Its steps are global steps."""

    directory: Path | None = runtime(None)
    """The directory of the event files; by default tracking/tensorboard in the run's directory."""


class MlflowSettings(Section):
    """MLflow. Its steps are global steps. Credentials are taken from MLflow's own variables."""

    tracking_uri: str | None = runtime(None)
    """The server or database; by default MLFLOW_TRACKING_URI, or tracking/mlflow.db in the run's directory."""
    experiment: str = runtime("ratchet")
    """The experiment."""
    name: str | None = runtime(None)
    """The run's name in the tracker; by default the name of its directory."""


class TrackingSection(Section):
    """Trackers for the run's metrics; any number can be used together. metrics.jsonl is always written."""

    wandb: WandbSettings | None = runtime(None)
    """Weights & Biases."""
    trackio: TrackioSettings | None = runtime(None)
    """trackio."""
    tensorboard: TensorboardSettings | None = runtime(None)
    """TensorBoard."""
    mlflow: MlflowSettings | None = runtime(None)
    """MLflow."""
    grace_seconds: float = runtime(60.0, ge=0)
    """How long a command waits for trackers at its end. Anything left unsent is sent by the next command."""

    @property
    def chosen(self) -> dict[str, Section]:
        """The settings of the enabled trackers by name."""
        settings = {name: getattr(self, name) for name in ("wandb", "trackio", "tensorboard", "mlflow")}
        return {name: section for name, section in settings.items() if section is not None}
