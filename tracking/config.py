"""Settings of the trackers."""

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
    """What the run is called; by default as here."""
    group: str | None = runtime(None)
    """The group of runs that it belongs to."""
    tags: list[str] = runtime([])
    """Tags of the run."""
    mode: Literal["online", "offline"] = runtime("online")
    """offline: write files that `wandb sync` uploads later."""


class TrackioSettings(Section):
    """trackio: a local database, viewed with `trackio show`, or a Space of the Hub."""

    project: str = runtime("ratchet")
    """The project."""
    name: str | None = runtime(None)
    """What the run is called; by default as here."""
    group: str | None = runtime(None)
    """The group of runs that it belongs to."""
    space_id: str | None = runtime(None)
    """Space that the metrics are sent to (ORG/NAME), with the usual token of the Hub."""
    directory: Path | None = runtime(None)
    """Where the local database is; by default TRACKIO_DIR, or where trackio puts it."""


class TensorboardSettings(Section):
    """TensorBoard. Its steps are global steps."""

    directory: Path | None = runtime(None)
    """Where the event files are; by default tracking/tensorboard in the run's directory."""


class MlflowSettings(Section):
    """MLflow. Its steps are global steps. Credentials are taken from MLflow's own variables."""

    tracking_uri: str | None = runtime(None)
    """The server or database; by default MLFLOW_TRACKING_URI, or tracking/mlflow.db in the run's directory."""
    experiment: str = runtime("ratchet")
    """The experiment."""
    name: str | None = runtime(None)
    """What the run is called; by default as here."""


class TrackingSection(Section):
    """Trackers for the run's metrics; any of them, several at once. metrics.jsonl is always written."""

    wandb: WandbSettings | None = runtime(None)
    """Weights & Biases."""
    trackio: TrackioSettings | None = runtime(None)
    """trackio."""
    tensorboard: TensorboardSettings | None = runtime(None)
    """TensorBoard."""
    mlflow: MlflowSettings | None = runtime(None)
    """MLflow."""
    grace_seconds: float = runtime(60.0, ge=0)
    """How long the end of a command waits for trackers. What is missing then is sent by the next command."""

    @property
    def chosen(self) -> dict[str, Section]:
        """The settings of each tracker that is fed, by its name."""
        settings = {name: getattr(self, name) for name in ("wandb", "trackio", "tensorboard", "mlflow")}
        return {name: found for name, found in settings.items() if found is not None}
