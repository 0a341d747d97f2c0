"""Slurm for tests: a development cluster on this machine (scripts/dev-slurm.sh), or a fake (fake_slurm.py)."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import fake_slurm
from warm_jobs import warm_command

SCRIPT = Path(__file__).parents[2] / "scripts" / "dev-slurm.sh"
FIRST_NODE_PORT = 11
UNTIL_GO = "until test -e go; do sleep 0.1; done"
"""A job's script that waits for a file in its directory."""
SECONDS_UNTIL_SAVED = 6
"""slurmctld writes its state at most this long after a change."""
FIELDS = ["JobID", "State", "ExitCode", "NodeList", "Submit", "Start", "End", "JobName", "Partition"]


class ClusterRefused(Exception):  # noqa: N818 - the message says how to get a cluster
    """No cluster can run on this machine; the message says what is missing and how to get it."""


def wait_for(condition: Callable[[], object], seconds: float = 200, what: str = "") -> None:
    """Wait until the condition holds. Raises AssertionError after a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} seconds: {what or condition}"
        time.sleep(0.1)


def free_base_port(nodes: int) -> int:
    """Return a base port such that all ports of a cluster are free."""
    for base in random.Random().sample(range(20000, 32000, 100), 50):
        if all(is_free(base + offset) for offset in [0, 1, *range(FIRST_NODE_PORT, FIRST_NODE_PORT + nodes)]):
            return base
    raise AssertionError("no free ports between 20000 and 32000")


def is_free(port: int) -> bool:
    with socket.socket() as listener:
        with contextlib.suppress(OSError):
            listener.bind(("", port))
            return True
        return False


class Slurm:
    """A real or fake cluster, controlled by Slurm's commands."""

    environment: dict[str, str]
    """The environment variables that a process needs to use the cluster."""

    def run(self, *command: str) -> str:
        """Run a command on this cluster, and return its output."""
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **self.environment}
        )
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout.strip()

    def submit(self, script: str, *options: str) -> str:
        """Submit a bash script without output files, and return its id. Options override the defaults."""
        defaults = ["--parsable", "--output=/dev/null"]
        return self.run("sbatch", *defaults, *options, f"--wrap={script}")

    def jobs(self) -> set[str]:
        """The ids of all jobs and array tasks (5_0) that wait, run or are just ending."""
        return set(self.run("squeue", "--noheader", "--array", "--format=%i").split())

    def job(self, job_id: str) -> dict[str, str]:
        """Return the controller's information on a job: JobState, Restarts, NodeList, Reason and so on."""
        line = self.run("scontrol", "--oneliner", "show", "job", job_id)
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def accounting(self, job_ids: Iterable[str]) -> dict[str, dict[str, str]]:
        """The last accounting record of each job by id (for an array: 5_0): FIELDS, with State as one word.

        Accounting lags by about a second, so a job that was just submitted may be missing. Waiting tasks of an array
        share a record (5_[4-15]).
        """
        chosen = f"--jobs={','.join(job_ids)}"
        table = self.run("sacct", "-X", "-n", "-P", chosen, f"--format={','.join(FIELDS)}")
        records = [dict(zip(FIELDS, line.split("|"), strict=True)) for line in table.splitlines()]
        for record in records:
            record["State"] = record["State"].split()[0]  # CANCELLED by 0
        return {record["JobID"]: record for record in records}

    def wait_for_state(self, job_id: str, state: str, seconds: float = 200) -> None:
        """Wait until a job is in this state (RUNNING, COMPLETED, ...) according to the controller."""
        wait_for(lambda: self.job(job_id)["JobState"] == state, seconds, f"job {job_id} is {state}")

    def node_state(self, node: str) -> str:
        """Return idle, mixed, allocated, down and so on; with a star if the node does not respond."""
        return self.run("sinfo", "--noheader", "--partition=gpu", f"--nodes={node}", "--format=%T")

    def set_down(self, node: str) -> None:
        """End everything on a node, as if it had failed; requeueable jobs start elsewhere."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def set_up(self, node: str) -> None:
        """Bring a node back into service, and wait until it accepts jobs."""
        self.run("scontrol", "update", f"nodename={node}", "state=resume")
        wait_for(lambda: self.node_state(node) in ("idle", "mixed", "allocated"), 200, f"{node} is back")


class FakeCluster(Slurm):
    """A fake cluster (fake_slurm.py) in a separate process, which ends with this one."""

    def __init__(self, folder: Path) -> None:
        """Start the cluster in a directory that does not exist yet."""
        self.folder = folder
        self.environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}"}
        command = [sys.executable, fake_slurm.__file__, "serve", str(folder), *warm_command([])]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == b"ready\n"

    def run(self, *command: str) -> str:
        """Run a command without starting a process, because tests that wait run many commands."""
        code, out, err = fake_slurm.ask(str(self.folder), list(command), {**os.environ, **self.environment})
        assert code == 0, f"{command}: {err}"
        return out.strip()

    def end(self) -> None:
        """End the cluster with all of its jobs."""
        self.server.communicate(timeout=60)

    def kill(self, daemon: str) -> None:
        """Make slurmctld or slurmdbd unresponsive; `up` repairs that."""
        self.run("control", "silence", daemon)

    def up(self) -> None:
        """Make all daemons respond again."""
        self.run("control", "heal")


class Cluster(Slurm):
    """A real cluster in its own directory. It ends with the process that started it, however that ends."""

    def __init__(self, state: Path, nodes: int = 4) -> None:
        """Start a cluster of `nodes` nodes (node1 and so on, 8 CPUs and 8 fake GPUs each) in a new directory."""
        self.state = state
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.environment = {"SLURM_CONF": str(state / "etc" / "slurm.conf")}
        self.options = {
            "DEV_SLURM_STATE": str(state),
            "DEV_SLURM_NODES": str(nodes),
            "DEV_SLURM_PORT": str(free_base_port(nodes)),
        }
        # Its standard input ends with this process, even if this one is killed.
        self.ending = subprocess.Popen(
            ["bash", "-c", 'read -r; exec bash "$0" down', str(SCRIPT)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **self.options},
            start_new_session=True,
        )
        try:
            self.up()
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """End the cluster; a second call does nothing."""
        assert self.ending.stdin is not None
        self.ending.stdin.close()
        assert self.ending.wait(timeout=60) == 0, f"{SCRIPT} down failed in {self.state}"

    def script(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run dev-slurm.sh for this cluster."""
        environment = {**os.environ, **self.options}
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=500, check=False, env=environment
        )

    def up(self) -> str:
        """Start or repair the cluster, and return the commands that a shell has to evaluate."""
        result = self.script("up")
        if result.returncode == 2:
            raise ClusterRefused(result.stderr.strip())
        assert result.returncode == 0, result.stderr
        return result.stdout

    def process(self, daemon: str) -> int:
        """Return the process id of munged, mariadbd, slurmdbd, slurmctld or a node."""
        return int((self.state / "pids" / daemon).read_text())

    def kill(self, daemon: str) -> None:
        """Kill a daemon with SIGKILL; `up` repairs that."""
        os.kill(self.process(daemon), signal.SIGKILL)

    def restart_controller(self) -> None:
        """Kill slurmctld with SIGKILL, and start it again; running jobs continue.

        A killed controller loses state that it has not written yet, even accepted jobs. So this first waits until
        everything submitted before the call is written.
        """
        called = time.time()
        written = self.state / "jobs" / "job_state"
        # It writes nothing if nothing has changed.
        while time.time() < called + SECONDS_UNTIL_SAVED and not (
            written.exists() and written.stat().st_mtime > called
        ):
            time.sleep(0.1)
        self.kill("slurmctld")
        self.up()
