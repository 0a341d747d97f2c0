"""Coordinates the launchers of a multi-node training: rendezvous, stop requests, exit codes and lost nodes.

Node 0 serves a torch `TCPStore`, which the ranks use for their rendezvous as well. Twice a second each node
writes its state there and reads the others'. On their own, torch's ranks would wait for a lost node until a collective
times out. Here a node is lost after LOST_SECONDS without a heartbeat; if node 0 is lost, all nodes are.
"""

import errno
import math
import os
import socket
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import msgspec

from contracts import stopping
from contracts.attempt import beat, report_failure
from contracts.errors import TransientError, UserError
from training.parallel import ParallelConfig

if TYPE_CHECKING:
    from torch.distributed import TCPStore

ARRIVAL_SECONDS = 180.0
"""How long a node waits for the others at the rendezvous."""
PORT_SECONDS = 20.0
"""How long node 0 waits for its port, which an earlier attempt may still hold."""
POLL_SECONDS = 0.5
CONNECT_SECONDS = 10.0
"""Timeout of one attempt to connect to the store."""
LOST_SECONDS = 30.0
END_SECONDS = 45.0
"""How long a node's ranks may take to exit, in addition to the grace period, before the others stop waiting."""
CLOSING_SECONDS = 5.0


class State(msgspec.Struct):
    """A node's state in the store."""

    training: str
    """Identifies the training; the same on all nodes."""
    host: str
    token: str
    """Unique per launcher, to detect two with the same NODE_RANK."""
    beat: int = 0
    """Heartbeat counter."""
    stop: int = 0
    """The signal by which it was asked to stop, or 0."""
    codes: list[int] | None = None
    """Exit codes of its ranks, once they have exited."""
    leaving: bool = False
    """Whether it is done with the store."""


@dataclass(frozen=True)
class Rendezvous:
    """This node's rank, and the address of node 0."""

    node: int
    address: str
    port: int

    @classmethod
    def read(cls, parallel: ParallelConfig) -> "Rendezvous":
        """Read NODE_RANK, MASTER_ADDR and MASTER_PORT.

        Raises:
            UserError: a variable is missing or invalid.
        """
        values = {name: os.environ.get(name, "") for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}
        last = parallel.nodes - 1
        wrong = [
            *([] if _number(values["NODE_RANK"], 0, last) else [f"a number from 0 to {last} as NODE_RANK"]),
            *([] if values["MASTER_ADDR"] else ["the address of node 0 as MASTER_ADDR"]),
            *([] if _number(values["MASTER_PORT"], 1, 65535) else ["a free port of node 0 as MASTER_PORT"]),
        ]
        if wrong:
            found = ", ".join(f"{name}={value!r}" if value else f"no {name}" for name, value in values.items())
            raise UserError(
                f"parallel.nodes is {parallel.nodes}: this command runs once on every node and needs "
                f"{', '.join(wrong)}; found {found}. By hand under Slurm: srun --ntasks-per-node=1 bash -c "
                "'NODE_RANK=$SLURM_NODEID MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) "
                "MASTER_PORT=29500 python -m training ...'. On one node, set parallel.nodes to 1."
            )
        return cls(int(values["NODE_RANK"]), values["MASTER_ADDR"], int(values["MASTER_PORT"]))

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


def _number(text: str, lowest: int, highest: int) -> bool:
    return text.isascii() and text.isdigit() and lowest <= int(text) <= highest


class Nodes:
    """All nodes of a training, as seen by one node's launcher."""

    def __init__(self, rendezvous: Rendezvous, count: int, training: str) -> None:
        """Prepare the coordination; `join` connects.

        Args:
            rendezvous: this node's rank, and the address of node 0.
            count: number of nodes.
            training: identifies the training; nodes of another one are refused.
        """
        self.rendezvous = rendezvous
        self.count = count
        self.stop = 0
        """The signal by which the nodes were asked to stop, or 0."""
        self.ends: dict[int, list[int]] = {}
        """Exit codes of each node's ranks (empty for a lost node), in the order in which they became known."""
        self.finishing = False
        """Whether this node's ranks have exited."""
        self._own = State(training, socket.gethostname(), uuid.uuid4().hex)
        self._known: list[State | None] = [None] * count
        self._last_heard = [0.0] * count
        """Time of each node's last heartbeat."""
        self._exited_at = math.inf
        """Time at which this node's ranks had all exited; infinity until then."""
        self._store_is_gone = False
        self._joined = False
        self._last_error = ""
        self._rejection: UserError | None = None
        self._exchange_thread = threading.Thread(target=self._exchange, name="nodes", daemon=True)

    @property
    def hosts(self) -> list[str]:
        """Host names of the nodes."""
        return [state.host if state else "" for state in self._known]

    def join(self) -> None:
        """Wait until all nodes have joined.

        Raises:
            UserError: this node does not belong to the others, or the port is taken.
            TransientError: some did not join in time.
            Stopped: one of the nodes was asked to stop.
        """
        self._exchange_thread.start()
        deadline = time.monotonic() + ARRIVAL_SECONDS
        try:
            while not all(self._known):
                if self._rejection:
                    raise self._rejection
                if time.monotonic() > deadline:
                    raise TransientError(self._describe_missing())
                for state in self._known:
                    if state and state.stop:
                        raise stopping.Stopped(128 + state.stop)
                time.sleep(0.05)
        except stopping.Stopped as stopped:
            self._own.stop = int(str(stopped)) - 128
            self._leave()
            raise
        self._joined = True
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _describe_missing(self) -> str:
        missing = [str(node) for node, state in enumerate(self._known) if state is None]
        if self._known[0]:
            return (
                f"node {', '.join(missing)} of the {self.count} nodes of this training did not come to "
                f"{self.rendezvous} (node 0, {self.hosts[0]}) within {ARRIVAL_SECONDS:g} s"
            )
        return (
            f"node {self.rendezvous.node} ({self._own.host}) waited {ARRIVAL_SECONDS:g} s for the node 0 of this "
            f"training at {self.rendezvous}: {self._last_error or 'it does not answer'}"
        )

    # While the training runs

    def ask_to_stop(self, number: int) -> None:
        """Ask the other nodes to stop as well."""
        if not self.stop and not self.others_failed:
            self.stop = self._own.stop = number

    def finish(self, codes: set[int]) -> set[int]:
        """Publish the exit codes of this node's ranks, wait for those of the other nodes, and return all of them.

        The wait is limited once a node has failed or was asked to stop. A lost node counts as exit code 1.
        """
        self.finishing, self._exited_at = True, time.monotonic()
        self.ends[self.rendezvous.node] = self._own.codes = sorted(codes)
        limit = math.inf
        while len(self.ends) < self.count and time.monotonic() < limit:
            if limit == math.inf and (self.stop or any(end != [0] for end in list(self.ends.values()))):
                limit = time.monotonic() + stopping.grace_seconds() + END_SECONDS
            if number := stopping.requested():
                self.ask_to_stop(number)
            beat()  # the other launchers watch their own ranks
            time.sleep(0.05)
        self._leave()
        self._report_failed_nodes()
        return {code for node in range(self.count) for code in self.ends.get(node) or [1]}

    def _leave(self) -> None:
        """Announce that this node is done with the store; node 0, which serves it, waits for the others."""
        self._own.leaving = True
        deadline = time.monotonic() + CLOSING_SECONDS
        waited_for = range(self.count) if self.rendezvous.node == 0 else [self.rendezvous.node]
        while self._exchange_thread.is_alive() and time.monotonic() < deadline:
            states = [self._known[node] for node in waited_for if self.ends.get(node) != []]
            if all(state.leaving for state in states if state):
                break
            time.sleep(0.05)

    def _report_failed_nodes(self) -> None:
        """Report which other nodes have failed: a lost one cannot report it itself."""
        for node, codes in self.ends.items():
            if node == self.rendezvous.node or codes == [0] or self.stop:
                continue
            name = f"node {node} ({self.hosts[node]}) of the training"
            if codes:
                text = f"{name} ended with exit code {', '.join(map(str, codes))}; its output says why"
            else:
                text = f"{name} is lost: it was killed, or cannot be reached any more"
            print(f"error: {text}", file=sys.stderr)
            # A node that was lost before this node's ranks exited is the reason that they failed.
            if not codes and self._last_heard[node] < self._exited_at:
                report_failure("transient", text)

    @property
    def others_failed(self) -> bool:
        """Whether another node has failed before any stop request."""
        others = [end for node, end in list(self.ends.items()) if node != self.rendezvous.node]
        return not self.stop and any(end != [0] for end in others)

    def _watch(self) -> None:
        """Loop of the thread that reacts to the other nodes' states."""
        while True:
            now = time.monotonic()
            for node, state in enumerate(self._known):
                if node == self.rendezvous.node or state is None:
                    continue
                if state.stop and not self.stop and not self.others_failed:
                    self.stop = state.stop
                    if not self.finishing:
                        os.kill(os.getpid(), state.stop)
                if node not in self.ends and state.codes is not None:
                    self.ends[node] = state.codes
                elif node not in self.ends and (self._store_is_gone or now - self._last_heard[node] > LOST_SECONDS):
                    self.ends[node] = []
            time.sleep(0.05)

    # The store

    def _exchange(self) -> None:
        """Loop of the thread that talks to the store: its calls block forever if node 0 hangs."""
        from torch.distributed import DistError

        while self._rejection is None:
            try:
                store = self._open()
                while True:
                    self._write_and_read(store)
                    time.sleep(POLL_SECONDS)
            except UserError as error:
                self._rejection = error
            except (DistError, OSError) as error:
                self._last_error = str(error)
            if self._joined:  # node 0 is gone, and its port may be another training's soon
                self._store_is_gone = True
                return
            time.sleep(POLL_SECONDS)

    def _open(self) -> "TCPStore":
        """Connect to the store and register this node.

        Raises:
            UserError: this node does not belong to the others, or the port is taken.
            DistError, OSError: node 0 does not answer yet.
        """
        from torch.distributed import TCPStore

        node, address, port = self.rendezvous.node, self.rendezvous.address, self.rendezvous.port
        if node == 0:
            _wait_for_port(port)
        else:  # torch would print a warning each time
            socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
        timeout = timedelta(seconds=CONNECT_SECONDS)
        store = TCPStore(address, port, is_master=node == 0, wait_for_workers=False, timeout=timeout, multi_tenant=True)
        reason = ""
        if node and (first := _decode(store.get(_key(0)))).training != self._own.training:
            reason = (
                f"belongs to another training ({self._own.training}) than node 0 at {self.rendezvous} "
                f"({first.training})"
            )
        elif _decode(store.compare_set(_key(node), "", _encode(self._own))).token != self._own.token:
            reason = f"has NODE_RANK={node}, like another node that has joined node 0 at {self.rendezvous}"
        if reason:
            raise UserError(
                f"the node {self._own.host} {reason}. Give all nodes the same command, and each a NODE_RANK of its own."
            )
        return store

    def _write_and_read(self, store: "TCPStore") -> None:
        self._own.beat += 1
        store.set(_key(self.rendezvous.node), _encode(self._own))
        present = [node for node, state in enumerate(self._known) if state or store.check([_key(node)])]
        for node, content in zip(present, store.multi_get([_key(node) for node in present]), strict=True):
            state, known = _decode(content), self._known[node]
            if known is None or state.beat != known.beat:
                self._last_heard[node] = time.monotonic()
            self._known[node] = state


def _key(node: int) -> str:
    return f"ratchet/node-{node}"


def _encode(state: State) -> str:
    return msgspec.json.encode(state).decode()


def _decode(content: bytes) -> State:
    return msgspec.json.decode(content, type=State)


def _wait_for_port(port: int) -> None:
    """Wait until an earlier attempt has released the port.

    Raises:
        UserError: the port is still in use after PORT_SECONDS.
    """
    deadline = time.monotonic() + PORT_SECONDS
    while True:
        try:
            socket.create_server(("", port)).close()
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise UserError(
                    f"node 0 cannot listen at port {port}: {error.strerror}. Set MASTER_PORT to another one, the same "
                    "on all nodes."
                ) from error
        time.sleep(0.2)
