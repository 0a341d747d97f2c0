"""A fake Slurm cluster in one process, for tests: sbatch, squeue, sacct, scontrol, scancel, sinfo and srun.

    python fake_slurm.py serve DIRECTORY [COMMAND ...]   serves until its standard input ends, and then kills all jobs;
                                                         COMMAND precedes the commands of jobs' steps in Python
    DIRECTORY/bin/squeue ...                             works like the real program, as far as Ratchet uses it

Jobs are processes on this machine, and nodes are only names. Output, exit codes and states are those of Slurm 22.05 on
the development cluster. Users, accounts, memory, GPUs, job steps and most options are not implemented. Some things are
faster than in Slurm: accounting lags by a fifth of a second, requeued jobs wait as long, and time limits are exact to a
tick.
"""

import _socket
import contextlib
import inspect
import os
import re
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

TICK = 0.02
LAG = 0.2
"""Seconds by which accounting lags, and that a requeued job waits."""
KILL_WAIT = 1.0
"""Seconds between SIGTERM and SIGKILL."""
GRACE = 5.0
"""Seconds that a preempted job has until it is ended."""
CPUS = 8
NODES = [f"node{number}" for number in range(1, 5)]
PARTITIONS = {"gpu": 10, "low": 1}
"""Partitions with their priorities: waiting jobs of a higher one preempt running jobs of a lower one."""
PROGRAMS = ("sbatch", "squeue", "sacct", "scontrol", "scancel", "sinfo", "srun")
MARK = "FAKE_SLURM"
"""The environment variable, with the cluster's directory, of all processes of jobs."""
FLAGS = {"requeue", "no-requeue", "parsable", "exclusive"}
VALUED = {
    "account", "array", "begin", "chdir", "comment", "constraint", "cpus-per-task", "dependency", "exclude",
    "gpus-per-node", "job-name", "kill-on-invalid-dep", "mem", "nice", "nodelist", "nodes", "ntasks-per-node",
    "open-mode", "output", "partition", "qos", "signal", "time", "wrap",
}  # fmt: skip
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}


def ask(folder: str, argv: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """Send a command to the cluster in a folder. Returns its exit code, output and error output.

    Clients run this often, so it imports next to nothing.
    """
    here = os.open(folder, os.O_RDONLY)
    line = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        line.connect(f"/proc/self/fd/{here}/socket")  # the path of a socket has 107 characters at most
        request = [os.getcwd(), str(len(argv)), *argv, *(f"{name}={value}" for name, value in environment.items())]
        line.sendall("\0".join(request).encode(errors="surrogateescape"))
        line.shutdown(_socket.SHUT_WR)
        answer = b""
        while part := line.recv(1 << 16):
            answer += part
    finally:
        line.close()
        os.close(here)
    code, out, err = answer.decode().split("\0")
    return int(code), out, err


CLIENT = f"""
import _socket, os, sys

{inspect.getsource(ask)}

code, out, err = ask(sys.argv[1], [os.path.basename(sys.argv[2]), *sys.argv[3:]], dict(os.environ))
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


class Refused(Exception):  # noqa: N818 - a command's result
    """The failure of a command, with its message and exit code."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Request:
    """A command sent to the cluster."""

    directory: str
    argv: list[str]
    environment: dict[str, str]

    @classmethod
    def read(cls, said: bytes) -> "Request":
        """Decode a request sent by `ask`."""
        directory, count, *words = said.decode(errors="surrogateescape").split("\0")
        variables = words[int(count) :]
        return cls(directory, words[: int(count)], dict(item.split("=", 1) for item in variables))


@dataclass(eq=False)
class Job:
    """A job, or one task of an array."""

    raw: int
    base: int
    index: int | None
    options: dict[str, str]
    script: str
    environment: dict[str, str]
    limit: float
    """The time limit in seconds."""
    after: list[tuple[str, list[int]]]
    begin: float
    state: str = "PENDING"
    reason: str = "None"
    nodes: list[str] = field(default_factory=list)
    start: float | None = None
    end: float | None = None
    code: str = "0:0"
    restarts: int = 0
    warned: bool = False
    """Whether it was sent the signal before its time limit."""
    preempted: float | None = None
    kill_at: float = float("inf")
    becomes: str | None = None
    """Its state after its processes have ended, if not determined by their exit code."""
    again: bool = False
    """Whether it is requeued after that."""
    process: "subprocess.Popen[bytes] | None" = None
    history: list[list[tuple[float, dict[str, str]]]] = field(default_factory=list)
    """The accounting records of each start, with their times."""

    @property
    def id(self) -> str:
        return str(self.base) if self.index is None else f"{self.base}_{self.index}"

    @property
    def live(self) -> bool:
        return self.state not in ENDED

    @property
    def cpus(self) -> int:
        return CPUS if "exclusive" in self.options else int(self.options.get("cpus-per-task", "1"))

    @property
    def partition(self) -> str:
        return self.options.get("partition", "gpu")

    @property
    def width(self) -> int:
        return int(self.options.get("nodes", "1"))


class Controller:
    """The state of all jobs and nodes, and the commands that change it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[Job] = []
        self.next = 1
        self.down: set[str] = set()
        self.silent: set[str] = set()

    # -- scheduling

    def tick(self) -> None:
        now = time.time()
        for job in self.jobs:
            if job.process is not None:
                self.look_after(job, now)
        for job in sorted(self.jobs, key=lambda job: -PARTITIONS[job.partition]):
            if job.state == "PENDING":
                self.try_to_start(job, now)

    def look_after(self, job: Job, now: float) -> None:
        assert job.process is not None
        assert job.start is not None
        before = float(job.options.get("signal", "").partition("@")[2] or 60)
        if not job.warned and now > job.start + job.limit - before:
            job.warned = self.give_notice(job)  # retried until there is a step to send it to
        if now > job.start + job.limit and job.becomes is None:
            self.end(job, "TIMEOUT")
        if job.preempted is not None and now > job.preempted + GRACE and job.becomes is None:
            self.end(job, "PREEMPTED", again=True)
        if now > job.kill_at:
            self.signal(job, "KILL")
        if job.process.poll() is not None and (job.becomes is None or not list(self.processes(job))):
            self.ended(job, now)

    def ended(self, job: Job, now: float) -> None:
        assert job.process is not None
        code = job.process.returncode
        if job.becomes is None:
            job.code = f"{code}:0" if code >= 0 else f"0:{-code}"
        self.signal(job, "KILL")
        job.process = None
        self.close(job, job.becomes or ("COMPLETED" if code == 0 else "FAILED"), now)

    def close(self, job: Job, state: str, now: float) -> None:
        job.state, job.end, job.reason = state.split()[0], now, "None"
        self.account(job, State=state, ExitCode=job.code, End=moment(now))
        if job.again:
            job.state, job.reason, job.begin, job.restarts = "PENDING", "BeginTime", now + LAG, job.restarts + 1
            job.nodes, job.start, job.end, job.code, job.again = [], None, None, "0:0", False
            self.open(job)

    def open(self, job: Job) -> None:
        """Begin the accounting of a job, or of its next start."""
        job.history.append([])
        self.account(
            job, JobID=job.id, State="PENDING", ExitCode="0:0", NodeList="None assigned", Submit=moment(time.time()),
            Start="Unknown", End="Unknown", JobName=job.options["job-name"], Partition=job.partition,
        )  # fmt: skip

    def account(self, job: Job, **news: str) -> None:
        records = job.history[-1]
        records.append((time.time(), {**(records[-1][1] if records else {}), **news}))

    def try_to_start(self, job: Job, now: float) -> None:
        waits = self.waits_for(job)
        if waits == "DependencyNeverSatisfied" and job.options.get("kill-on-invalid-dep") == "yes":
            self.close(job, "CANCELLED", now)
            return
        if waits or now < job.begin:
            job.reason = waits or "BeginTime"
            return
        if job.width > len(NODES):
            job.reason = "PartitionConfig"
            return
        allowed = job.options["nodelist"].split(",") if "nodelist" in job.options else NODES
        allowed = [node for node in allowed if node not in job.options.get("exclude", "").split(",")]
        free = [node for node in allowed if node not in self.down and self.used(node) + job.cpus <= CPUS]
        job.reason = (
            "None" if len(free) >= job.width else "Resources" if set(allowed) - self.down else "ReqNodeNotAvail"
        )
        if job.reason == "None":
            self.start(job, free[: job.width])
            return
        for other in self.jobs:
            lower = PARTITIONS[other.partition] < PARTITIONS[job.partition]
            if lower and other.process is not None and other.preempted is None and set(other.nodes) & set(allowed):
                other.preempted = now
                self.give_notice(other)
                return

    def waits_for(self, job: Job) -> str | None:
        reason = None
        for kind, ids in job.after:
            for other in (other for other in self.jobs if other.base in ids):
                if other.live:
                    reason = reason or "Dependency"
                elif kind == "afterok" and other.state != "COMPLETED":
                    return "DependencyNeverSatisfied"
        return reason

    def used(self, node: str) -> int:
        return sum(job.cpus for job in self.jobs if job.process is not None and node in job.nodes)

    def start(self, job: Job, nodes: list[str]) -> None:
        job.state, job.nodes, job.start, job.warned, job.preempted = "RUNNING", nodes, time.time(), False, None
        job.becomes, job.kill_at = None, float("inf")
        names = {
            "SLURM_JOB_ID": job.raw, "SLURM_JOB_NODELIST": listed(nodes), "SLURM_JOB_NUM_NODES": len(nodes),
            "SLURM_NTASKS": len(nodes), "SLURM_RESTART_COUNT": job.restarts, "SLURM_JOB_NAME": job.options["job-name"],
            "SLURMD_NODENAME": nodes[0],
        }  # fmt: skip
        if job.index is not None:
            names |= {"SLURM_ARRAY_JOB_ID": job.base, "SLURM_ARRAY_TASK_ID": job.index}
        if not job.restarts:
            del names["SLURM_RESTART_COUNT"]
        environment = {**job.environment, **{name: str(value) for name, value in names.items()}, MARK: str(self.folder)}
        path = self.folder / "scripts" / str(job.raw)
        path.write_text(job.script)
        output = job.options.get("output", "slurm-%j.out")
        output = output.replace("%A", str(job.base)).replace("%j", str(job.raw))
        output = output.replace("%a", str(2**32 - 2 if job.index is None else job.index))
        with open(Path(job.options["chdir"], output), "ab") as log:
            job.process = subprocess.Popen(
                ["bash", str(path)], cwd=job.options["chdir"], env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        self.account(job, State="RUNNING", NodeList=listed(nodes), Start=moment(job.start))

    def processes(self, job: Job, *, steps: bool = False) -> Iterator[int]:
        """The processes of a job; with `steps`, only those started by srun."""
        wanted = {f"{MARK}={self.folder}".encode(), f"SLURM_JOB_ID={job.raw}".encode()}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                found = set((folder / "environ").read_bytes().split(b"\0"))
            except OSError:
                continue
            if wanted <= found and (not steps or any(name.startswith(b"SLURM_PROCID=") for name in found)):
                yield int(folder.name)

    def give_notice(self, job: Job) -> bool:
        """Send the signal that a job requested before its end, [B:]NAME[@SECONDS]; with B: only to its script."""
        place, _, name = job.options.get("signal", "").partition("@")[0].rpartition(":")
        if place != "B":
            return not name or self.signal(job, name, steps=True)
        assert job.process is not None
        job.process.send_signal(signal.Signals[f"SIG{name}"])
        return True

    def signal(self, job: Job, name: str, *, steps: bool = False) -> bool:
        """Send a signal to a job's processes. Returns whether there were any."""
        sent = False
        for pid in self.processes(job, steps=steps):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[f"SIG{name}"])
                sent = True
        return sent

    def end(self, job: Job, becomes: str, *, again: bool = False) -> None:
        """End a job's processes, after which it gets the state `becomes`."""
        now = time.time()
        job.again = again and "no-requeue" not in job.options
        if job.process is None:
            self.close(job, becomes, now)
            return
        job.becomes, job.state = becomes, "COMPLETING"
        job.kill_at = now if becomes == "NODE_FAIL" else now + KILL_WAIT
        if becomes != "NODE_FAIL":
            self.signal(job, "CONT")
            self.signal(job, "TERM")

    # -- commands

    def answer(self, request: Request) -> str:
        program, *arguments = request.argv
        try:
            if "slurmctld" in self.silent and program not in ("sacct", "control"):
                raise Refused(f"{program}: error: Unable to contact slurm controller (connect failure)")
            if "slurmdbd" in self.silent and program == "sacct":
                raise Refused("sacct: error: slurm_persist_conn_open: Connection refused\nsacct: error: slurmdbd")
            handle: Callable[..., str] = getattr(self, program)
            out = handle(arguments, request) if program == "sbatch" else handle(arguments)
        except Refused as refusal:
            return f"{refusal.code}\0\0{refusal}\n"
        return f"0\0{out}\n\0" if out else "0\0\0"

    def control(self, arguments: list[str]) -> str:
        """Handle commands that Slurm does not have: `silence DAEMON`, and `heal` for all daemons."""
        self.silent = {*self.silent, arguments[1]} if arguments[0] == "silence" else set()
        return ""

    def sbatch(self, arguments: list[str], request: Request) -> str:
        options: dict[str, str] = {}
        files = read_options(arguments, options)
        script = f"#!/bin/sh\n{options['wrap']}\n" if "wrap" in options else Path(files[0]).read_text()
        lines = re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)
        inside: dict[str, str] = {}
        read_options([word for line in lines for word in shlex.split(line)], inside)
        options = {**inside, **options}
        options.setdefault("job-name", "wrap" if "wrap" in options else Path(files[0]).name)
        options.setdefault("chdir", request.directory)
        if options.get("partition", "gpu") not in PARTITIONS:
            raise Refused(
                f"sbatch: error: invalid partition specified: {options['partition']}\n"
                "sbatch: error: Batch job submission failed: Invalid partition name specified"
            )
        begin = time.time() + float(options.get("begin", "now+0").removeprefix("now+"))
        common = (options, script, request.environment, seconds_of(options.get("time", "")))
        after = dependencies(options.get("dependency", ""))
        base, span = self.next, options.get("array")
        for index in [None] if span is None else array_indices(span):
            self.jobs.append(Job(self.next, base, index, *common, after, begin))
            self.open(self.jobs[-1])
            self.next += 1
        return str(base) if "parsable" in options else f"Submitted batch job {base}"

    def chosen(self, id: str) -> list[Job]:
        return [job for job in self.jobs if id in (job.id, str(job.base))]

    def scancel(self, arguments: list[str]) -> str:
        number = next((word.partition("=")[2] for word in arguments if word.startswith("--signal=")), None)
        for id in (word for word in arguments if not word.startswith("-")):
            found = [job for job in self.chosen(id) if job.live]
            if number is not None and not any(job.process for job in found):
                raise Refused(f"scancel: error: Kill job error on job id {id}: Invalid job id specified")
            for job in found:
                if number is not None:
                    self.signal(job, number, steps=True)
                elif job.becomes is None or job.process is None:
                    self.end(job, f"CANCELLED by {os.getuid()}")
        return ""

    def squeue(self, arguments: list[str]) -> str:
        form = option(arguments, "--format", "-o")
        whole = "--array" in arguments
        rows, seen = [], set()
        for job in self.jobs:
            if not job.live:
                continue
            id = job.id
            if job.index is not None and job.state == "PENDING" and not whole:
                if job.base in seen:
                    continue
                seen.add(job.base)
                waiting = [other.index for other in self.jobs if other.base == job.base and other.state == "PENDING"]
                id = f"{job.base}_[{','.join(map(str, waiting))}]"
            after = ",".join(f"{kind}:{other}(unfulfilled)" for kind, ids in job.after for other in ids)
            values = {
                "k": job.options.get("comment", "(null)"), "i": id, "F": str(job.base), "T": job.state,
                "r": job.reason, "N": listed(job.nodes), "j": job.options["job-name"], "E": after or "(null)",
            }  # fmt: skip
            rows.append(re.sub("%([a-zA-Z])", lambda match, values=values: values[match[1]], form))
        return "\n".join(rows)

    def sacct(self, arguments: list[str]) -> str:
        wanted = option(arguments, "--jobs", "-j", default="")
        fields = option(arguments, "--format", "-o", default="JobID,JobName,Partition,State,ExitCode").split(",")
        every = "--duplicates" in arguments or "-D" in arguments
        rows = []
        for job in self.jobs:
            if wanted and not {job.id, str(job.base)} & set(wanted.split(",")):
                continue
            known = [[record for when, record in start if when < time.time() - LAG] for start in job.history]
            starts = [records[-1] for records in known if records]
            rows += ["|".join(record[name] for name in fields) for record in (starts if every else starts[-1:])]
        return "\n".join(rows)

    def scontrol(self, arguments: list[str]) -> str:
        words = [word for word in arguments if not word.startswith("-")]
        if words[:2] == ["show", "hostnames"]:
            return "\n".join(expanded(words[2]))
        if words[:2] == ["show", "job"]:
            return "\n".join(self.described(job) for job in self.existing(words[2], "slurm_load_jobs error: "))
        if words[0] == "requeue":
            for job in self.existing(words[1]):
                if "no-requeue" in job.options:
                    raise Refused(f"Requested operation is presently disabled for job {words[1]}")
                self.end(job, "PREEMPTED" if job.preempted is not None else "REQUEUED", again=True)
            return ""
        values = {key.lower(): value for key, _, value in (word.partition("=") for word in words[1:])}
        if "nodename" in values:
            self.change_node(values["nodename"], values["state"])
            return ""
        for job in self.existing(values["jobid"]):
            if "dependency" in values:
                job.after = dependencies(values["dependency"])
            if "timelimit" in values:
                job.limit, job.warned = seconds_of(values["timelimit"]), False
        return ""

    def existing(self, id: str, prefix: str = "") -> list[Job]:
        if not (found := self.chosen(id)):
            raise Refused(f"{prefix}Invalid job id specified" + ("" if prefix else f" for job {id}"))
        return found

    def described(self, job: Job) -> str:
        ends = job.end or (job.start + job.limit if job.start and job.limit < float("inf") else None)
        fields = {
            "JobId": job.raw, "JobName": job.options["job-name"], "JobState": job.state, "Reason": job.reason,
            "Requeue": int("no-requeue" not in job.options), "Restarts": job.restarts, "ExitCode": job.code,
            "TimeLimit": f"{job.limit / 60:.0f}", "StartTime": moment(job.start), "EndTime": moment(ends),
            "PreemptTime": "None" if job.preempted is None else moment(job.preempted), "Partition": job.partition,
            "NodeList": listed(job.nodes), "NumNodes": job.width, "Comment": job.options.get("comment", "(null)"),
        }  # fmt: skip
        return " ".join(f"{name}={value}" for name, value in fields.items())

    def change_node(self, node: str, state: str) -> None:
        if state != "down":
            self.down.discard(node)
            return
        self.down.add(node)
        for job in self.jobs:
            if job.process is not None and job.becomes is None and node in job.nodes:
                self.end(job, "NODE_FAIL", again=True)

    def sinfo(self, arguments: list[str]) -> str:
        form = option(arguments, "--format", "-o")
        if "%P" in form:
            names = [f"{name}*" if name == "gpu" else name for name in PARTITIONS]
            return "\n".join(form.replace("%P", name).replace("%l", "infinite") for name in names)
        nodes = option(arguments, "--nodes", "-n", default=",".join(NODES)).split(",")
        return "\n".join(form.replace("%N", node).replace("%T", self.node_state(node)) for node in nodes)

    def node_state(self, node: str) -> str:
        used = self.used(node)
        return "down" if node in self.down else "idle" if not used else "allocated" if used >= CPUS else "mixed"


def read_options(words: list[str], options: dict[str, str]) -> list[str]:
    """Parse sbatch's options into `options`, and return the other words."""
    rest = []
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            rest.append(word)
        elif name in FLAGS or (name in VALUED and "=" in word):
            options[name] = value
        else:
            raise Refused(f"sbatch: unrecognized option '{word}'\nTry \"sbatch --help\" for more information", 255)
    return rest


def option(arguments: list[str], name: str, short: str, default: str | None = None) -> str:
    """The value of `--name=value`, `--name value` or `-n value`."""
    for number, word in enumerate(arguments):
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
        if word in (name, short):
            return arguments[number + 1]
    if default is None:
        raise Refused(f"this fake knows no call without {name}")
    return default


def dependencies(text: str) -> list[tuple[str, list[int]]]:
    """Parse dependencies like afterok:1:2,afterany:3. Unknown jobs count as completed."""
    found = []
    for part in filter(None, text.split(",")):
        kind, *ids = part.split(":")
        if kind not in ("afterok", "afterany") or not ids or not all(id.isdigit() for id in ids):
            raise Refused("sbatch: error: Batch job submission failed: Job dependency problem")
        found.append((kind, [int(id) for id in ids]))
    return found


def seconds_of(text: str) -> float:
    """Parse a time limit: minutes, minutes:seconds, or hours:minutes:seconds."""
    if not text:
        return float("inf")
    if not re.fullmatch(r"\d+(:\d+){0,2}", text):
        raise Refused("sbatch: error: Invalid --time specification", 255)
    parts = [int(part) for part in text.split(":")]
    if len(parts) == 1:
        return parts[0] * 60.0
    return float(sum(part * 60**place for place, part in enumerate(reversed(parts))))


def array_indices(text: str) -> list[int]:
    """Parse the indices of an array, 0-3 or 0-3%2; the limit of parallel tasks is ignored."""
    first, last = text.partition("%")[0].split("-")
    return list(range(int(first), int(last) + 1))


def listed(nodes: list[str]) -> str:
    """Format a list of nodes as node1 or node[1-2]."""
    numbers = [node.removeprefix("node") for node in nodes]
    return f"node[{numbers[0]}-{numbers[-1]}]" if len(nodes) > 1 else "".join(nodes)


def expanded(nodes: str) -> list[str]:
    """Expand a list of nodes like node1,node[2-3]."""
    found = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\])?", nodes):
        name, _, numbers = part.rstrip("]").partition("[")
        first, _, last = numbers.partition("-")
        found += [f"{name}{number}" for number in range(int(first), int(last or first) + 1)] if numbers else [name]
    return found


def moment(when: float | None) -> str:
    return "Unknown" if when is None else datetime.fromtimestamp(when).isoformat(timespec="seconds")


def run_step(arguments: list[str], warm: list[str]) -> None:
    """Run srun: one task per node of the job, all of which are killed if one fails.

    Every job starts it, so it imports next to nothing.

    Args:
        arguments: those of srun.
        warm: the beginning of the tasks' command.
    """
    output = "/dev/stdout"
    while arguments[0].startswith("-"):
        word = arguments.pop(0)
        if word == "--output":
            output = arguments.pop(0)
    base = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ["SLURM_JOB_ID"])
    output = output.replace("%A", base).replace("%j", os.environ["SLURM_JOB_ID"])
    output = output.replace("%a", os.environ.get("SLURM_ARRAY_TASK_ID", str(2**32 - 2)))
    tasks = set()
    for number in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
        place = {"SLURM_PROCID": str(number), "SLURM_NODEID": str(number), "SLURM_LOCALID": "0"}
        pid = os.fork()
        if pid == 0:
            log = os.open(output.replace("%t", str(number)), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            command = [*(warm if "-m" in arguments else []), *arguments]
            os.execvpe(command[0], command, {**os.environ, **place})
        tasks.add(pid)
    worst = 0
    while tasks:
        pid, status = os.wait()
        tasks.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        worst = max(worst, code if code >= 0 else 128 - code)
        if code:
            for task in tasks:
                os.kill(task, 9)
    os._exit(worst)


STEP = f"import os, sys\n\n{inspect.getsource(run_step)}\n"


def serve(folder: Path, warm: list[str]) -> None:
    """Run the cluster until standard input ends.

    Args:
        warm: the beginning of a command that runs a Python module faster; it may be empty.
    """
    (folder / "bin").mkdir(parents=True)
    (folder / "scripts").mkdir()
    (folder / "client.py").write_text(CLIENT)
    (folder / "step.py").write_text(f"{STEP}run_step(sys.argv[1:], {warm!r})\n")
    for name in (*PROGRAMS, "control"):
        run = [str(folder / "step.py")] if name == "srun" else [str(folder / "client.py"), str(folder), name]
        command = shlex.join([sys.executable, "-IS", *run])
        (folder / "bin" / name).write_text(
            f'#!/bin/sh\n# A fake: tests/pipelines/fake_slurm.py.\nexec {command} "$@"\n'
        )
        (folder / "bin" / name).chmod(0o755)
    controller = Controller(folder)
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        os.chdir(folder)
        listener.bind("socket")
        listener.listen(64)
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in selector.select(TICK if any(job.live for job in controller.jobs) else None):
                if key.fileobj is sys.stdin:
                    for job in controller.jobs:
                        controller.signal(job, "KILL")
                    return
                line, _ = listener.accept()
                # A client may be killed before it gets the answer, for example by its own scancel.
                with line, contextlib.suppress(BrokenPipeError), line.makefile("rb") as file:
                    if said := file.read():
                        line.sendall(controller.answer(Request.read(said)).encode())
            controller.tick()


if __name__ == "__main__":
    serve(Path(sys.argv[2]), sys.argv[3:])
