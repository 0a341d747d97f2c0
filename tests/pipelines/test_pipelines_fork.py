"""Values that change between iterations, forks, and forced stages: what is planned, taken over and made again."""

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from handmade import write_model
from pipelines_smallest import write_smallest

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.fingerprint import digest
from contracts.ledger import Ledger
from contracts.manifest import MANIFEST
from contracts.publication import Publication
from contracts.records import CHECKPOINT
from contracts.template import ChatFields
from pipelines.config.load import load_run_config
from pipelines.config.run import RunConfig
from pipelines.graph import Graph, Node
from pipelines.iteration import build_graph
from pipelines.main import main
from pipelines.run.decisions import Decision
from pipelines.run.directory import RunDirectory, dated
from pipelines.run.force import RECORD, report_forced, resolve, set_aside
from pipelines.run.fork import CONFIG, fork


def publish(node: Node, content: str = "") -> None:
    """Something small in place of what the stage would publish."""
    publication = Publication(node.output, CHECKPOINT, node.config.stage, digest(node.name))
    publication.begin()
    publication.scratch("file").write_text(f"{node.name} {content}")
    publication.commit("file", Ledger("rows"))
    publication.publish(
        key_parts={}, inputs={}, input_paths={}, unit="rows", weights=None, versions={}, seconds={}, facts={}
    )


def settings_of(graph: Graph, name: str) -> dict[str, object]:
    return graph.nodes[name].config.model_dump()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stages of two iterations have published, each something."""
    config = load_run_config(write_smallest(tmp_path_factory.mktemp("published")), [])
    for node in build_graph(config, 2).nodes.values():
        publish(node)
    return config.run_directory


@pytest.fixture
def run(smallest: Path, published: Path) -> RunDirectory:
    """A run of two iterations whose stages have all published something."""
    config = load_run_config(smallest, [])
    run = RunDirectory(config.run_directory)
    run.claim(config, smallest, 2)
    shutil.copytree(published, run.path, dirs_exist_ok=True)
    return run


def test_changes_hold_from_their_iteration_on(smallest: Path) -> None:
    overrides = [
        "changes.2.training.settings.beta=0.3",
        "changes.3.generation.k=8",
        "changes.3.prompts.per_iteration=5",
    ]
    graph = build_graph(load_run_config(smallest, overrides), 4)
    beta = [settings_of(graph, f"iteration-00{i}/training")["settings"]["beta"] for i in (1, 2, 3, 4)]
    assert beta == [0.1, 0.3, 0.3, 0.3]
    assert [settings_of(graph, f"iteration-00{i}/generation")["k"] for i in (1, 2, 3, 4)] == [4, 4, 8, 8]
    windows = [settings_of(graph, f"iteration-00{i}/generation") for i in (1, 2, 3, 4)]
    assert [(w["start"], w["count"]) for w in windows] == [(0, 12), (12, 12), (24, 5), (29, 5)]
    unchanged = build_graph(load_run_config(smallest, []), 1)
    assert unchanged.nodes["iteration-001/training"].config == graph.nodes["iteration-001/training"].config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("changes.2.policy=elsewhere", "policy cannot change"),
        ("changes.2.prompts.train.limit=3", "prompts.train cannot change"),
        ("changes.0.training.settings.beta=0.3", "from iteration 1 on"),
        ("changes.2.training.settings.bta=0.3", "Did you mean 'beta'"),
        ("changes.2.training.learning_rate=-1", "greater than 0"),
        ("changes.two.training.settings.beta=0.3", "changes"),
    ],
)
def test_changes_that_cannot_be(smallest: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_run_config(smallest, [override])


def test_a_fork_shares_its_past_and_takes_back_what_comes_out_the_same(run: RunDirectory) -> None:
    target, count = fork(run, 2, ["training.settings.beta=0.3", "executor.parallel=1"], None)
    assert target == run.path.parent / "smallest-from-2"
    whole = len(build_graph(run.config, 2).nodes)
    assert count == whole
    first = target / "iteration-001/training/file"
    assert first.samefile(run.path / "iteration-001/training/file")
    assert not (target / "iteration-002").exists()
    kept = list((target / "superseded/iteration-002/generation").iterdir())
    assert [path.name for path in kept] == [Artifact.open(run.path / "iteration-002/generation").manifest.key[:16]]

    config = load_run_config(target / CONFIG, [])
    assert config.run_directory == target
    assert config.executor.parallel == 1
    graph = build_graph(config, 2)
    assert settings_of(graph, "iteration-001/training")["settings"]["beta"] == 0.1
    assert settings_of(graph, "iteration-002/training")["settings"]["beta"] == 0.3
    again = RunDirectory.existing(target)
    again.claim(config, target / CONFIG, 2)
    assert again.config.changes == {2: {"training": {"settings": {"beta": 0.3}}}}


def test_a_fork_without_changes_makes_everything_from_there_on_again(run: RunDirectory) -> None:
    target, count = fork(run, 2, [], "again")
    assert target.name == "again"
    assert count == sum(not name.startswith("iteration-002/") for name in build_graph(run.config, 2).nodes)
    assert not (target / "superseded").exists()


def test_a_fork_of_a_fork_keeps_the_earlier_changes(run: RunDirectory) -> None:
    first, _ = fork(run, 1, ["training.settings.beta=0.3", "generation.k=8"], "first")
    second, _ = fork(RunDirectory.existing(first), 2, ["training.settings.beta=0.5"], "second")
    third, _ = fork(RunDirectory.existing(second), 1, ["training.settings.beta=0.7"], "third")
    graphs = [build_graph(load_run_config(path / CONFIG, []), 2) for path in (second, third)]
    beta = [[settings_of(graph, f"iteration-00{i}/training")["settings"]["beta"] for i in (1, 2)] for graph in graphs]
    assert beta == [[0.3, 0.5], [0.7, 0.7]]
    assert settings_of(graphs[1], "iteration-002/generation")["k"] == 8


@pytest.mark.parametrize(
    ("first", "overrides", "name", "message"),
    [
        (0, [], None, "give 1 to 3"),
        (4, [], None, "give 1 to 3"),
        (2, ["policy=elsewhere"], None, "'policy' cannot change"),
        (2, ["training.settings.bta=1"], None, "Did you mean"),
        (2, [], "smallest", "exists already"),
        (2, [], "../elsewhere", "plain name"),
        (2, [], "a b", "name"),
    ],
)
def test_forks_that_cannot_be_leave_nothing_behind(
    run: RunDirectory, first: int, overrides: list[str], name: str | None, message: str
) -> None:
    before = sorted(run.path.parent.iterdir())
    with pytest.raises(UserError, match=message):
        fork(run, first, overrides, name)
    assert sorted(run.path.parent.iterdir()) == before


def test_forced_stages_are_moved_aside_once_and_compared(run: RunDirectory) -> None:
    graph = build_graph(run.config, 2)
    stages = resolve(graph, ["iteration-002/training", "setup/sft"])
    set_aside(run.path, graph, stages)
    assert not any((graph.nodes[name].output / MANIFEST).exists() for name in stages)
    publish(graph.nodes["setup/sft"])
    set_aside(run.path, graph, stages)  # the same command after a kill: setup/sft was made again already
    assert (graph.nodes["setup/sft"].output / MANIFEST).exists()
    publish(graph.nodes["iteration-002/training"], "otherwise")
    lines = report_forced(run.path, graph)
    assert lines[1] == "forced setup/sft: the same content"
    assert lines[0].startswith("forced iteration-002/training: other content")
    assert not (run.path / RECORD).exists()
    set_aside(run.path, graph, ["setup/sft"])
    assert len(list((run.path / "superseded/setup/sft").iterdir())) == 2


def test_a_command_killed_before_the_move_moves_when_it_is_given_again(run: RunDirectory) -> None:
    graph = build_graph(run.config, 2)
    output = graph.nodes["setup/sft"].output
    inode = (output / MANIFEST).stat().st_ino
    record = {"setup/sft": {"digest": Artifact.open(output).manifest.digest, "inode": inode}}
    (run.path / RECORD).write_text(json.dumps(record))
    set_aside(run.path, graph, ["setup/sft"])
    assert not graph.nodes["setup/sft"].output.exists()


def test_which_stages_a_name_means(run: RunDirectory) -> None:
    graph = build_graph(run.config, 2)
    assert resolve(graph, ["iteration-*/training"]) == ["iteration-001/training", "iteration-002/training"]
    assert all(name.startswith("iteration-002/heldout/") for name in resolve(graph, ["iteration-002/heldout/"]))
    with pytest.raises(UserError, match="Did you mean 'iteration-002/training'"):
        resolve(graph, ["iteration-002/trainin"])


def test_a_dry_run_of_a_fork_sees_what_it_would_take_back(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what comes after it: the inputs of the next stages are found where they are kept."""
    target, _ = fork(run, 1, ["training.settings.beta=0.3"], "dry")
    graph = build_graph(load_run_config(target / CONFIG, []), 1)
    monkeypatch.setattr("pipelines.run.verdicts.probe_versions", lambda *_: {})
    seen: dict[str, Path] = {}

    def decide(node: Node, versions: object, directory: Path, where: Callable[[Path], Path]) -> Decision:
        paths = node.config.input_paths()
        seen.update({f"{node.name} reads {path.relative_to(target)}": where(path) for path in paths})
        key = Artifact.open(run.path / node.name).manifest.key
        return Decision(True, "as before", key)

    monkeypatch.setattr("pipelines.run.verdicts.decide", decide)
    assert main(["run", str(target / CONFIG), "--iters", "1", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("reuse") == len(graph.nodes)
    place = seen["iteration-001/reward reads iteration-001/generation"]
    assert place.is_relative_to(target / "superseded/iteration-001/generation")
    assert (place / MANIFEST).is_file()


def test_a_copied_run_goes_on_elsewhere(run: RunDirectory, smallest: Path, tmp_path: Path) -> None:
    copy = tmp_path / "far" / "away" / "smallest"
    shutil.copytree(run.path, copy)
    config = load_run_config(smallest, [f"directory={copy.parent}"])
    other = tmp_path / "other.yaml"
    other.write_text(smallest.read_text())
    with pytest.raises(UserError, match="is the run of"):
        RunDirectory(copy).claim(config, other, 2)
    RunDirectory(copy).claim(config, smallest, 2)


def test_a_run_has_one_date_whenever_it_is_resumed_or_forked(
    smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a chat template writes today's date, that of the day on which the run was made; else it is in no key."""

    def on(day: str, path: Path, *overrides: str) -> RunConfig:
        class Day(datetime.date):
            @classmethod
            def today(cls) -> "Day":
                return cls.fromisoformat(day)

        monkeypatch.setattr(datetime, "date", Day)
        return dated(load_run_config(path, [*given, *overrides]))

    dating, plain = tmp_path / "dating", tmp_path / "plain"
    for model, template in ((dating, "{{ strftime_now('%d %b %Y') }}"), (plain, "{{ messages[0].content }}")):
        write_model(model, model.name)
        (model / "chat_template.jinja").write_text(template)
    judge = f"scorers.reward={{kind: reward_model, model: {dating}}}"
    given = ["sft=null", "reward_model=null", judge, f"policy={dating}"]

    def dates(config: RunConfig) -> dict[str, set[str | None]]:
        found: dict[str, set[str | None]] = {}
        for node in build_graph(config, 2).nodes.values():
            if isinstance(node.config, ChatFields):
                found.setdefault(node.config.stage, set()).add(node.config.date)
        return found

    config = on("2025-07-31", smallest)
    both = {"generation": {"2025-07-31"}, "score": {"2025-07-31"}}
    assert dates(config) == both
    RunDirectory(config.run_directory).claim(config, smallest, 2)
    again = on("2025-08-01", smallest)
    assert dates(again) == both
    other = on("2025-08-01", smallest, "name=other")
    assert dates(other)["generation"] == {"2025-08-01"}
    assert dates(on("2025-08-01", smallest, "name=other", "date=2024-12-24"))["generation"] == {"2024-12-24"}
    fixed = on("2025-08-01", smallest, "name=other", f"policy={plain}")
    assert dates(fixed) == {"generation": {None}, "score": {"2025-08-01"}}

    target, _ = fork(RunDirectory.existing(config.run_directory), 2, ["training.settings.beta=0.3"], "forked")
    given = []
    assert dates(on("2025-09-01", target / CONFIG)) == both


def test_a_variable_that_the_template_does_not_read_is_refused_before_anything_starts(
    smallest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    write_model(model, "model")
    (model / "chat_template.jinja").write_text("{{ enable_thinking }}{{ messages[0].content }}")
    command = ["run", str(smallest), "--iters", "1", "sft=null", "reward_model=null", f"policy={model}"]
    command += ["scorers.reward={kind: rule, function: embedded.reviews:well_formed}"]
    assert main([*command, "chat_template_kwargs.enable_thinkin=false"]) == 2
    message = capsys.readouterr().err
    assert "chat_template_kwargs.enable_thinkin is set" in message
    assert "It reads enable_thinking." in message
    assert not (smallest.parent / "runs").exists()
