"""The launchers of one training on several nodes hear from each other: who is there, asked to stop, or has ended.

Each keeps a connection to that of node 0, which passes everything on. torch's own processes would wait for a node that
is gone for as long as a collective may take; a connection that closes, or is silent for LOST_SECONDS, says it at once.
"""

import errno
import os
import queue
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from contracts import stopping
from contracts.attempt import beat, report_failure
from contracts.errors import TransientError, UserError
from training.parallel import ParallelConfig

ARRIVAL_SECONDS = 180.0
"""How long a node waits for the others to come."""
PORT_SECONDS = 20.0
"""How long node 0 waits for its port, which an earlier attempt may still have."""
BEAT_SECONDS = 1.0
LOST_SECONDS = 30.0
END_SECONDS = 45.0
"""How long the processes of a node may take to end, the grace period aside, before nobody waits for them any more."""
CLOSING_SECONDS = 5.0


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A node says that it is there."""

    node: int
    training: str
    """What it was started for, the same on all nodes."""
    host: str


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """All are there."""

    hosts: list[str]
    port: int
    """Where torch's processes meet, on node 0."""


class Refusal(msgspec.Struct, frozen=True, tag=True):
    """A node that does not belong here."""

    reason: str


class Beat(msgspec.Struct, frozen=True, tag=True):
    """Nothing new."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """A node was asked to stop by a signal."""

    number: int


class End(msgspec.Struct, frozen=True, tag=True):
    """A node's processes have ended."""

    node: int
    codes: list[int]
    """Their exit codes; none if the node is lost."""

    @property
    def is_good(self) -> bool:
        """Whether all of them have ended well."""
        return self.codes == [0]


Message = Hello | Welcome | Refusal | Beat | Stop | End
_decoder = msgspec.json.Decoder(Message)


@dataclass(frozen=True)
class Place:
    """Which of the nodes this one is, and where to find node 0."""

    node: int
    address: str
    port: int

    @classmethod
    def read(cls, parallel: ParallelConfig) -> "Place":
        """Take it from the environment.

        Raises:
            UserError: a variable is missing or makes no sense.
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


class _Line:
    """One connection to another node; messages are lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.heard = time.monotonic()
        self.node = 0
        self.host = ""
        self.open = True
        self.unread: list[Message] = []
        """What came together with a message after which somebody else reads on."""
        self._rest = b""

    def send(self, message: Message) -> None:
        """Where the line is broken nothing happens: that shows in reading it."""
        self.socket.settimeout(CLOSING_SECONDS)
        with suppress(OSError):
            self.socket.sendall(msgspec.json.encode(message) + b"\n")

    def receive(self, seconds: float = 0.0) -> list[Message]:
        """What has come, or comes in a while; `open` is False afterwards if nothing more will."""
        if self.unread:
            messages, self.unread = self.unread, []
            return messages
        self.socket.settimeout(seconds)
        try:
            data = self.socket.recv(1 << 16)
        except (TimeoutError, BlockingIOError):
            return []
        except OSError:
            data = b""
        self.open = bool(data) and len(self._rest) < 1 << 20
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            return [_decoder.decode(line) for line in lines]
        except msgspec.DecodeError:  # somebody else
            self.open = False
            return []

    def close(self) -> None:
        """Nothing more is sent or received."""
        self.open = False
        self.socket.close()


class Nodes:
    """All nodes of a training, as the launcher of one of them knows them."""

    def __init__(self, place: Place, count: int, training: str, end_processes: Callable[[], None]) -> None:
        """Nobody is asked yet.

        Args:
            place: this node's.
            count: of the nodes.
            training: what tells this training from others; a node that says something else is refused.
            end_processes: asks this node's processes to end; called every second while another node has failed.
        """
        self.place = place
        self.count = count
        self.hosts: list[str] = []
        """Names of the nodes' machines."""
        self.stop = 0
        """The signal by which the nodes were asked to stop, if they were."""
        self.ends: dict[int, End] = {}
        """By node, in the order in which they came to be known here."""
        self.finishing = False
        """Whether this node's processes have ended."""
        self._training = training
        self._end_processes = end_processes
        self._lines: list[_Line] = []
        self._news: queue.SimpleQueue[Stop | End] = queue.SimpleQueue()
        self._failed_since: float | None = None
        self._closing_since: float | None = None
        self._thread = threading.Thread(target=self._converse, name="nodes", daemon=True)

    # Coming together

    def join(self) -> int:
        """Wait until all nodes are here; returns the port at which torch's processes meet.

        Raises:
            UserError: this node does not belong to the others, or the port is taken.
            TransientError: not all came.
            Stopped: one of the nodes was asked to stop.
        """
        try:
            welcome = self._receive_all() if self.place.node == 0 else self._arrive()
        except stopping.Stopped as stopped:
            for line in self._lines:
                line.send(Stop(int(str(stopped)) - 128))
            raise
        self.hosts = welcome.hosts
        self._thread.start()
        return welcome.port

    def _receive_all(self) -> Welcome:
        host = socket.gethostname()
        deadline = time.monotonic() + ARRIVAL_SECONDS
        with self._serve() as server:
            while len(self._lines) < self.count - 1:
                if time.monotonic() > deadline:
                    missing = sorted(set(range(1, self.count)) - {line.node for line in self._lines})
                    raise TransientError(
                        f"node {', '.join(map(str, missing))} of the {self.count} nodes of this training did not come "
                        f"to {self.place} (node 0, {host}) within {ARRIVAL_SECONDS:g} s"
                    )
                with suppress(TimeoutError):
                    self._admit(_Line(server.accept()[0]))
                for line in self._lines:
                    _stop_with(line.receive())
                self._lines = [line for line in self._lines if line.open]
        with socket.create_server(("", 0), family=self._family) as free:
            port = int(free.getsockname()[1])
        self._lines.sort(key=lambda line: line.node)
        welcome = Welcome([host, *(line.host for line in self._lines)], port)
        for line in self._lines:
            line.heard = time.monotonic()
            line.send(welcome)
        return welcome

    def _serve(self) -> socket.socket:
        """Listen, as soon as an earlier attempt lets go of the port."""
        deadline = time.monotonic() + PORT_SECONDS
        while True:
            try:
                server = socket.create_server(("", self.place.port), family=self._family)
                server.settimeout(0.2)
                return server
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise UserError(
                        f"node 0 cannot listen at port {self.place.port}: {error.strerror}. Set MASTER_PORT to another "
                        "one, the same on all nodes."
                    ) from error
            time.sleep(0.2)

    @property
    def _family(self) -> socket.AddressFamily:
        """Of the address of node 0: IPv4, or IPv6 if it has no other."""
        with suppress(OSError):
            found = socket.getaddrinfo(self.place.address, self.place.port, type=socket.SOCK_STREAM)
            if all(each[0] == socket.AF_INET6 for each in found):
                return socket.AF_INET6
        return socket.AF_INET

    def _admit(self, line: _Line) -> None:
        hello, *line.unread = line.receive(CLOSING_SECONDS) or [Beat()]
        if not isinstance(hello, Hello):
            line.close()
            return
        reason = ""
        if hello.training != self._training:
            reason = f"is of another training ({hello.training}) than node 0 at {self.place} ({self._training})"
        elif hello.node in {line.node for line in self._lines} | {0}:
            reason = f"has NODE_RANK={hello.node}, which another one has that is with node 0 at {self.place} already"
        if reason:
            text = f"the node {hello.host} {reason}. Give all nodes the same command, and each a NODE_RANK of its own."
            print(f"error: {text}", file=sys.stderr)
            line.send(Refusal(text))
            line.close()
            return
        line.node, line.host = hello.node, hello.host
        self._lines.append(line)

    def _arrive(self) -> Welcome:
        deadline = time.monotonic() + ARRIVAL_SECONDS
        why = ""
        while time.monotonic() < deadline:
            try:
                line = _Line(socket.create_connection((self.place.address, self.place.port), timeout=CLOSING_SECONDS))
            except OSError as error:
                why = f": {error.strerror or error}"
                time.sleep(0.2)
                continue
            self._lines = [line]
            line.send(Hello(self.place.node, self._training, socket.gethostname()))
            while line.open and time.monotonic() < deadline:
                message, *line.unread = line.receive(0.5) or [Beat()]
                _stop_with([message])
                if isinstance(message, Refusal):
                    raise UserError(message.reason)
                if isinstance(message, Welcome):
                    return message
            line.close()
            why = ": it answers, but not all nodes came"
            time.sleep(0.2)
        raise TransientError(
            f"node {self.place.node} ({socket.gethostname()}) waited {ARRIVAL_SECONDS:g} s for the node 0 of this "
            f"training at {self.place}{why}"
        )

    # While the training runs

    def ask_to_stop(self, number: int) -> None:
        """Have the other nodes stop too; for a signal handler."""
        if not self.stop and self._failed_since is None:
            self.stop = number
            self._news.put(Stop(number))

    def finish(self, codes: set[int]) -> set[int]:
        """Tell how this node's processes have ended, wait for those of the others, and return all exit codes.

        Nobody waits long for others once a node has failed or was asked to stop. A lost node counts as 1.
        """
        self.finishing = True
        self._news.put(End(self.place.node, sorted(codes)))
        limit: float | None = None
        while len(self.ends) < self.count and self._thread.is_alive() and (limit is None or time.monotonic() < limit):
            if limit is None and (self.stop or not all(end.is_good for end in list(self.ends.values()))):
                limit = time.monotonic() + stopping.grace_seconds() + END_SECONDS
            beat()  # what the others still do is their own to watch
            time.sleep(0.05)
        self._closing_since = time.monotonic()
        self._thread.join(CLOSING_SECONDS + 1)
        self._tell_of_others()
        return {
            code for node in range(self.count) for code in (self.ends[node].codes if node in self.ends else [1]) or [1]
        }

    def _tell_of_others(self) -> None:
        """Say which other nodes have failed: one that is lost does not say it itself."""
        came_first = True
        for end in self.ends.values():
            came_first = came_first and end.node != self.place.node
            if end.node == self.place.node or end.is_good or self.stop:
                continue
            name = f"node {end.node} ({self.hosts[end.node]}) of the training"
            if end.codes:
                text = f"{name} ended with exit code {', '.join(map(str, end.codes))}; its output says why"
            else:
                text = f"{name} is lost: it was killed, or cannot be reached any more"
            print(f"error: {text}", file=sys.stderr)
            if came_first and not end.codes:
                report_failure("transient", text)

    def _converse(self) -> None:
        """The thread: tell, listen, and act on what is heard."""
        told = pressed = 0.0
        leaving = False
        while True:
            while not self._news.empty():
                self._learn(self._news.get(), None)
            now = time.monotonic()
            if self._closing_since is not None:
                if not leaving and self.place.node != 0:
                    for line in self._lines:
                        with suppress(OSError):
                            line.socket.shutdown(socket.SHUT_WR)
                leaving = True
                if not self._lines or now - self._closing_since > CLOSING_SECONDS:
                    return
            elif now - told > BEAT_SECONDS:
                told = now
                for line in self._lines:
                    line.send(Beat())
            readable, _, _ = select.select([line.socket for line in self._lines], [], [], 0.05)
            for line in [line for line in self._lines if line.unread or line.socket in readable]:
                for message in line.receive():
                    if isinstance(message, Stop | End):
                        self._learn(message, line)
            for line in [line for line in self._lines if not line.open or now - line.heard > LOST_SECONDS]:
                self._lose(line)
            if self._failed_since is not None and not self.finishing and now - pressed > 1:
                pressed = now
                self._end_processes()
                if now - self._failed_since > stopping.grace_seconds() + END_SECONDS:
                    os._exit(1)  # blocked inside of a library; the processes below die with this one

    def _learn(self, message: Stop | End, source: _Line | None) -> None:
        """Take in what this node (source: None) or another one says, and pass it on."""
        if source is None or self.place.node == 0:
            for line in self._lines:
                if line is not source:
                    line.send(message)
        if isinstance(message, Stop):
            if source is not None and not self.stop and self._failed_since is None:
                self.stop = message.number
                os.kill(os.getpid(), message.number)
        elif message.node not in self.ends:
            self.ends[message.node] = message
            failed = message.node != self.place.node and not message.is_good
            if failed and not self.stop and self._failed_since is None:
                self._failed_since = time.monotonic()

    def _lose(self, line: _Line) -> None:
        """The line is closed: its node has said how it ended, or is lost. Without node 0 all others are."""
        line.close()
        self._lines.remove(line)
        for node in [line.node] if self.place.node == 0 else range(self.count):
            if node != self.place.node and node not in self.ends:
                self._learn(End(node, []), line)


def _stop_with(messages: list[Message]) -> None:
    for message in messages:
        if isinstance(message, Stop):
            raise stopping.Stopped(128 + message.number)
