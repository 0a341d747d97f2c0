"""Sends metrics to MLflow, on a server or in a database in the run's directory."""

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

from contracts.nested import flatten
from contracts.points import Point
from tracking.base import POINT, TrackedRun

RUN_TAG = "ratchet.run"
AT_ONCE = 1000
"""The most metrics that MLflow accepts in one request."""
LONGEST_PARAM = 6000
PARAMS_AT_ONCE = 100


class MlflowTracker:
    """An MLflow run, which later commands find by its tag."""

    def __init__(self, run: TrackedRun, settings: dict[str, Any]) -> None:
        run.tracking_directory.mkdir(exist_ok=True)
        configured_uri = settings["tracking_uri"] or os.environ.get("MLFLOW_TRACKING_URI")
        if not configured_uri:
            _delete_incomplete(run.tracking_directory / "mlflow.db")
        self._client = MlflowClient(configured_uri or f"sqlite:///{run.tracking_directory / 'mlflow.db'}")
        known_experiment = self._client.get_experiment_by_name(settings["experiment"])
        experiment = (
            known_experiment.experiment_id
            if known_experiment
            else self._client.create_experiment(settings["experiment"])
        )
        known = self._client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run.id}'", max_results=1)
        if known:
            self._id = known[0].info.run_id
        else:
            tags = {RUN_TAG: run.id, MLFLOW_RUN_NAME: settings["name"] or run.name}
            self._id = self._client.create_run(experiment, tags=tags).info.run_id
            params = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in flatten(run.config).items()]
            for begin in range(0, len(params), PARAMS_AT_ONCE):
                self._client.log_batch(self._id, params=params[begin : begin + PARAMS_AT_ONCE])
        self._client.update_run(self._id, status="RUNNING")
        indices = [int(metric.value) for metric in self._client.get_metric_history(self._id, POINT)]
        self._recorded = max(indices, default=-1) + 1

    def recorded(self) -> int:
        """The number of points that the server has."""
        return self._recorded

    def log(self, points: list[Point]) -> None:
        """Send the points in requests as large as MLflow accepts; each request is applied completely or not at all."""
        batch: list[Metric] = []
        for point in points:
            values = {POINT: point.point, "system/iteration": point.iteration, **point.metrics}
            time = int(1000 * point.time)
            metrics = [Metric(name, float(value), time, point.global_step) for name, value in values.items()]
            if len(batch) + len(metrics) > AT_ONCE:
                self._client.log_batch(self._id, metrics=batch)
                batch = []
            batch += metrics
        if batch:
            self._client.log_batch(self._id, metrics=batch)

    def close(self) -> None:
        """Mark the run as ended; the next command continues it."""
        self._client.set_terminated(self._id)


def _delete_incomplete(database: Path) -> None:
    """Delete a database that holds no run: MLflow creates a database in many steps and cannot resume after a kill."""
    if not database.exists():
        return
    with contextlib.closing(sqlite3.connect(database)) as connection:
        try:
            if connection.execute("SELECT 1 FROM runs").fetchone():
                return
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise
    for path in database.parent.glob(f"{database.name}*"):
        path.unlink()
