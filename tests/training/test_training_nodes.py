"""One training started on several nodes, which are this machine: the same results, stops, failures and ends of all."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    ROOT,
    RunningTraining,
    assert_same_training,
    dpo_settings,
    five_steps,
    make_model,
    run_cli,
    run_here,
)

import training.nodes
from contracts import stopping
from contracts.artifacts import Artifact
from contracts.errors import TransientError, UserError
from training.launch import exit_code
from training.nodes import Nodes, Rendezvous
from training.parallel import ParallelConfig

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero3": {"dp": 4, "nodes": 2, "zero": 3},
    "fsdp2-tp": {"dp": 2, "tp": 2, "nodes": 2, "zero": "fsdp2"},
}
SMALL = {"dp": 2, "nodes": 2}
KILL = os.kill
"""Which a test of stops replaces."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def start_nodes(
    start: Callable[..., RunningTraining], settings: dict[str, Any], **changes: Any
) -> list[RunningTraining]:
    """The same command on two nodes."""
    port = str(free_port())
    variables = [{"NODE_RANK": node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for node in "01"]
    return [start(settings, variables=each, **changes) for each in variables]


def end_all(nodes: list[RunningTraining], code: int, seconds: float = 120.0) -> None:
    """Both end with this exit code, in time."""
    begin = time.monotonic()
    assert [node.end() for node in nodes] == [code] * len(nodes), logs(nodes)
    assert time.monotonic() - begin < seconds, logs(nodes)


def logs(nodes: list[RunningTraining]) -> str:
    return "\n".join((node.attempt / "log").read_text() for node in nodes)


def parent(pid: int) -> int:
    """The process that a process was forked from."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kinds(node: RunningTraining) -> set[str]:
    return {failure["kind"] for failure in node.failures()}


@pytest.fixture(scope="module")
def one(
    models: dict[str, Path], pairs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """Settings, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("one")
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = make_model(folder / "model", tied=False, **shape)
    settings = five_steps("policy", model, pairs, Path()) | {"micro_batch_tokens": 48}
    run_here("policy", **settings, output=folder / "one")
    return settings, folder / "one"


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_nodes_of_two_processes_train_like_one_process(
    layout: str, one: tuple[dict[str, Any], Path], start: Any, tmp_path: Path
) -> None:
    settings, expected = one
    nodes = start_nodes(start, settings, output=tmp_path / "out", parallel=LAYOUTS[layout])
    end_all(nodes, 0)
    facts = Artifact.open(tmp_path / "out").manifest.facts
    assert facts["processes"] == 4
    assert facts["parallel"].items() >= LAYOUTS[layout].items()
    assert_same_training(expected, tmp_path / "out")
    assert [(node.attempt / "progress.json").exists() for node in nodes] == [True, False]
    assert not any(kinds(node) for node in nodes)


@pytest.mark.slow
def test_a_stop_of_one_node_or_of_every_process_stops_all_and_the_same_command_goes_on(
    models: dict[str, Path], pairs: dict[str, Path], start: Any, tmp_path: Path
) -> None:
    settings = dpo_settings(models, pairs, tmp_path / "out", epochs=16, micro_batch_tokens=96, checkpoint_seconds=1000)
    whole = start(settings, output=tmp_path / "whole", parallel={"dp": 2})
    steps = 0
    for number, everything in ((signal.SIGTERM, False), (signal.SIGUSR2, True)):
        nodes = start_nodes(start, settings, parallel=SMALL)
        nodes[0].wait_for(lambda node=nodes[0], before=steps: node.steps > before)
        steps = nodes[0].steps
        if everything:  # as a scheduler does
            for pid in [pid for node in nodes for pid in (*node.processes(), parent(node.process.pid))]:
                os.kill(pid, number)
        else:
            nodes[1].process.send_signal(number)
        end_all(nodes, 128 + number, stopping.DEFAULT_GRACE + 10)
        assert [kinds(node) for node in nodes] == [{"stopped"}] * 2
        assert "Traceback" not in logs(nodes), logs(nodes)
    end_all([whole, *start_nodes(start, settings, parallel=SMALL)], 0)
    end, expected = (Artifact.open(tmp_path / name).manifest for name in ("out", "whole"))
    assert end.facts["resumed_steps"] >= steps
    assert end.files == expected.files  # nor does it matter which node a process is on


@pytest.mark.slow
def test_a_killed_process_or_node_ends_all_nodes(
    models: dict[str, Path], pairs: dict[str, Path], start: Any, tmp_path: Path
) -> None:
    settings = dpo_settings(models, pairs, tmp_path / "out", epochs=50, checkpoint_seconds=1000, parallel=SMALL)
    nodes = start_nodes(start, settings)
    nodes[0].wait_for(lambda: nodes[0].steps)
    os.kill(nodes[1].processes("rank 1")[0], signal.SIGKILL)
    end_all(nodes, 1, 40)
    assert {"transient"} <= kinds(nodes[1])
    assert re.search(r"node 1 .* ended with exit code .*137", (nodes[0].attempt / "log").read_text())

    nodes = start_nodes(start, settings, fresh=True)  # the process that it forks ranks from ends with it
    nodes[0].wait_for(lambda: nodes[0].steps)
    nodes[0].process.send_signal(signal.SIGKILL)
    assert nodes[0].end() == -signal.SIGKILL
    end_all(nodes[1:], 1, 40)
    assert any("node 0" in failure["text"] and "is lost" in failure["text"] for failure in nodes[1].failures())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_node_0_alone_finds_wrong_is_the_exit_code_of_all(
    models: dict[str, Path], pairs: dict[str, Path], start: Any, tmp_path: Path
) -> None:
    """A damaged input: the processes of the other node have ended well by then."""
    damaged = tmp_path / "pairs"
    subprocess.run(["cp", "-r", pairs["pairs"], damaged], check=True)
    (shard,) = damaged.glob("shard-*")
    shard.write_text(shard.read_text().replace('"iteration":0', '"iteration":1', 1))
    settings = dpo_settings(models, pairs | {"pairs": damaged}, tmp_path / "out", max_steps=1, parallel=SMALL)
    nodes = start_nodes(start, settings)
    end_all(nodes, 2)
    assert any("damaged" in failure["text"] for failure in nodes[0].failures())
    assert re.search(r"node 0 .* ended with exit code 2;", (nodes[1].attempt / "log").read_text())
    assert not (tmp_path / "out").exists()


def test_another_node_than_0_leaves_publishing_alone(
    models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    settings = dpo_settings(models, pairs, tmp_path / "out", max_steps=1)
    artifact = run_here("policy", **settings)
    rest = tmp_path / f".out.partial-{artifact.manifest.key[:16]}"
    rest.mkdir()
    (tmp_path / "stage.json").write_text(json.dumps(settings | {"parallel": SMALL}, default=str))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run_cli("policy", "--config", tmp_path / "stage.json", NODE_RANK="1", **address)
    assert rest.exists()
    run_cli("policy", "--config", tmp_path / "stage.json", NODE_RANK="0", **address)
    assert not rest.exists()


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"dp": 3, "nodes": 2}, r"nodes=2 does not divide the 3 processes"),
        ({"tp": 4, "nodes": 2}, r"nodes=2 leaves 2 of 4 processes on each node, which tp · sp = 4 does not divide"),
        ({"dp": 3, "sp": 2, "nodes": 2}, r"leaves 3 of 6 processes"),
        ({"nodes": 0}, "greater than or equal to 1"),
    ],
)
def test_nodes_that_do_not_divide(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**parallel)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NODE_RANK": "1", "MASTER_PORT": "1"}, "the address of node 0 as MASTER_ADDR; found .*no MASTER_ADDR"),
        ({"NODE_RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "from 0 to 1 as NODE_RANK; found NODE_RANK='2'"),
        ({"NODE_RANK": "one", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "found NODE_RANK='one'"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "0"}, "from 0 to 1 as NODE_RANK, a free port of node 0 as MASTER_PORT"),
        ({"NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "65536"}, "found .*MASTER_PORT='65536'"),
    ],
)
def test_variables_that_say_nothing(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as error:
        Rendezvous.read(ParallelConfig(dp=2, nodes=2))
    assert "srun --ntasks-per-node=1" in str(error.value)


def test_a_command_without_an_address(models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_text(
        json.dumps(dpo_settings(models, pairs, tmp_path / "out", parallel=SMALL), default=str)
    )
    result = run_cli(
        "policy", "--config", tmp_path / "stage.json", check=False, NODE_RANK="0", MASTER_ADDR="", MASTER_PORT="29500"
    )
    assert result.returncode == 2
    assert "MASTER_ADDR" in result.stderr
    assert not [*tmp_path.glob(".out*")]


# The nodes' own conversation, without processes to train


class Talk:
    """Nodes in threads of this process."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = count
        self.port = free_port()
        self.signals: list[int] = []
        self.nodes: list[Nodes] = []
        monkeypatch.setattr(training.nodes.os, "kill", lambda pid, number: self.signals.append(number))

    def node(self, number: int, training: str = "this one") -> Nodes:
        rendezvous = Rendezvous(number, "127.0.0.1", self.port)
        self.nodes.append(Nodes(rendezvous, self.count, training))
        return self.nodes[-1]

    def join(self, *nodes: Nodes) -> list[Any]:
        """The error that each gets, or None."""
        found: list[Any] = [None] * len(nodes)

        def run(place: int) -> None:
            try:
                nodes[place].join()
            except BaseException as error:
                found[place] = error

        self.together(*(lambda place=place: run(place) for place in range(len(nodes))))
        return found

    def together(self, *actions: Callable[[], Any]) -> None:
        threads = [threading.Thread(target=each, name=f"node {number}") for number, each in enumerate(actions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(200)
            assert not thread.is_alive()

    def finish(self, codes: dict[Nodes, set[int]]) -> list[set[int]]:
        found: dict[int, set[int]] = {}

        def run(node: Nodes) -> None:
            found[node.rendezvous.node] = node.finish(codes[node])

        self.together(*(lambda node=node: run(node) for node in codes))
        return [found[node] for node in sorted(found)]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Talk]]:
    monkeypatch.setattr(training.nodes, "ARRIVAL_SECONDS", 10.0)
    talks: list[Talk] = []

    def begin(count: int) -> Talk:
        talks.append(Talk(count, monkeypatch))
        return talks[-1]

    yield begin
    for node in [node for each in talks for node in each.nodes]:
        node.finishing = True  # its thread, which has heard of a failure, would end this process after a while


def wait_until(condition: Callable[[], Any], seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_all_learn_how_all_have_ended(talk: Callable[[int], Talk]) -> None:
    three = talk(3)
    nodes = [three.node(number) for number in range(3)]
    assert three.join(*nodes) == [None] * 3
    assert [node.hosts for node in nodes] == [[socket.gethostname()] * 3] * 3
    found = three.finish(dict(zip(nodes, [{0}, {143}, {2, 143}], strict=True)))
    assert found == [{0, 2, 143}] * 3
    assert not three.signals


def test_one_stop_reaches_every_node_once(talk: Callable[[int], Talk]) -> None:
    three = talk(3)
    nodes = [three.node(number) for number in range(3)]
    three.join(*nodes)
    nodes[2].ask_to_stop(signal.SIGUSR1)
    wait_until(lambda: len(three.signals) == 2)
    nodes[0].ask_to_stop(signal.SIGTERM)  # what it hears only now
    three.finish({node: {128 + signal.SIGUSR1} for node in nodes})
    assert three.signals == [signal.SIGUSR1] * 2
    assert {node.stop for node in nodes} == {signal.SIGUSR1}
    assert not any(node.others_failed for node in nodes)


def test_a_failure_ends_the_processes_of_the_others(talk: Callable[[int], Talk], capfd: Any) -> None:
    two = talk(2)
    nodes = [two.node(0), two.node(1)]
    two.join(*nodes)
    failed = threading.Thread(target=nodes[1].finish, args=({1},))
    failed.start()
    wait_until(lambda: nodes[0].others_failed)
    assert nodes[0].finish({143}) == {1, 143}
    failed.join(200)
    assert not two.signals
    assert "node 1" in capfd.readouterr().err


@pytest.mark.parametrize("gone", [0, 1])
def test_a_node_that_says_nothing_is_lost(
    gone: int, talk: Callable[[int], Talk], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(training.nodes, "LOST_SECONDS", 1.5)
    two = talk(2)
    nodes = [two.node(0), two.node(1)]
    two.join(*nodes)
    monkeypatch.setattr(nodes[gone], "_write_and_read", lambda store: None)
    wait_until(lambda: nodes[1 - gone].others_failed)
    monkeypatch.setenv("RATCHET_ATTEMPT", str(tmp_path))
    assert nodes[1 - gone].finish({143}) == {1, 143}
    (failure,) = [json.loads(path.read_text()) for path in tmp_path.glob("failure-*.json")]
    assert failure["kind"] == "transient"
    assert f"node {gone} ({socket.gethostname()}) of the training is lost" in failure["text"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_node_0_the_others_are_lost(
    number: int, talk: Callable[[int], Talk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its launcher is killed; or its machine hangs, so that connections stay open and nothing is ever answered."""
    monkeypatch.setattr(training.nodes, "LOST_SECONDS", 3.0)
    monkeypatch.setattr(training.nodes, "ARRIVAL_SECONDS", 60.0)
    two = talk(2)
    code = (
        "from training.nodes import Nodes, Rendezvous; import time; "
        f"Nodes(Rendezvous(0, '127.0.0.1', {two.port}), 2, 'this one').join(); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        try:
            node = two.node(1)
            assert two.join(node) == [None]
            KILL(process.pid, number)
            wait_until(lambda: node.others_failed)
            assert node.finish({143}) == {1, 143}
        finally:
            KILL(process.pid, signal.SIGKILL)


def test_the_wrong_nodes_are_refused(talk: Callable[[int], Talk]) -> None:
    three = talk(3)
    found = three.join(three.node(0), three.node(1), three.node(1), three.node(2, "another one"))
    assert isinstance(found[0], TransientError)
    assert re.match("node 2 of the 3 nodes of this training did not come to 127.0.0.1", str(found[0]))
    assert [type(error) for error in found[1:3]].count(UserError) == 1
    assert any("has NODE_RANK=1, like another node that has joined" in str(error) for error in found[1:3])
    assert isinstance(found[3], UserError)
    assert "belongs to another training (another one) than node 0" in str(found[3])


@pytest.mark.parametrize("asked", [0, 1])
def test_a_stop_while_the_others_are_awaited_stops_them(
    asked: int, talk: Callable[[int], Talk], monkeypatch: pytest.MonkeyPatch
) -> None:
    three = talk(3)
    nodes = [three.node(0), three.node(1)]
    sleep = time.sleep

    def interrupted(seconds: float) -> None:
        sleep(seconds)
        if threading.current_thread().name == f"node {asked}" and all(nodes[asked]._known[:2]):
            raise stopping.Stopped(128 + signal.SIGUSR2)

    monkeypatch.setattr(training.nodes.time, "sleep", interrupted)
    assert [str(error) for error in three.join(*nodes)] == [str(128 + signal.SIGUSR2)] * 2


@pytest.mark.slow
def test_a_node_that_never_comes(models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path) -> None:
    """The launcher gives up, and starts no rank."""
    settings = dpo_settings(models, pairs, tmp_path / "out", parallel=SMALL)
    (tmp_path / "stage.json").write_text(json.dumps(settings, default=str))
    port = free_port()
    code = (
        "import sys, torch, training.nodes\nfrom contracts.declaration import stages_of\n"
        "from contracts.stage import main\n"
        f"training.nodes.ARRIVAL_SECONDS = 1; sys.argv[1:] = ['policy', '--config', {str(tmp_path / 'stage.json')!r}]; "
        "main(stages_of('training'), 'training')"
    )
    for node, message in (("0", "node 1 of the 2 nodes"), ("1", "node 1 (")):
        attempt = tmp_path / f"task-{node}"
        attempt.mkdir()
        variables = {"NODE_RANK": node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT, env={**os.environ, **variables, "RATCHET_ATTEMPT": str(attempt)},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert result.returncode == 1, result.stderr
        (failure,) = [json.loads(path.read_text()) for path in attempt.glob("failure-*.json")]
        assert failure["kind"] == "transient"
        assert message in failure["text"]
        assert f"127.0.0.1:{port}" in failure["text"]


@pytest.mark.parametrize(
    ("codes", "stop", "expected"),
    [
        ({0}, 0, 0),
        ({0}, signal.SIGTERM, 0),
        ({0, 2, 143}, signal.SIGTERM, 2),
        ({0, 1, 140}, signal.SIGUSR2, 140),
        ({140, 143}, 0, 140),
        ({129, 143}, 0, 129),
        ({137, 143}, 0, 1),
        ({0, 1}, 0, 1),
    ],
)
def test_the_exit_code_of_all(codes: set[int], stop: int, expected: int) -> None:
    assert exit_code(codes, stop) == expected
