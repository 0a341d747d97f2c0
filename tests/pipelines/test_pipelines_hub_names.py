"""hf:ORG/NAME@REVISION wherever a model or a data set is named, against a double of the Hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from handmade import HandmadeRun
from hub_double import Account, HubDouble, pointer
from huggingface_hub import constants
from pipelines_smallest import PRETENDED

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.fingerprint import weights_fingerprint
from pipelines.main import main
from pipelines.run.directory import RunDirectory
from pipelines.run.plan import Plan, plan_run

MODEL, DATA = "alice/policy", "alice/prompts"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> HandmadeRun:
    """A finished run, whose checkpoints are pushed; nobody changes it."""
    return HandmadeRun(tmp_path_factory.mktemp("made")).build()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    """A double with a model and a data set, which this process takes for the Hub; and an empty cache."""
    with HubDouble() as double:
        for name, value in double.variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", double.endpoint)
        template = f"{double.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        double.create(DATA, "dataset", private=True, train__jsonl=b'{"prompt": "one"}\n')
        yield double


@pytest.fixture
def config(tmp_path: Path, hub: HubDouble, made: HandmadeRun) -> Path:
    """Config of a run that takes its policy, a scorer's model and its prompts from the Hub."""
    assert main(["push", str(configured(made, tmp_path)), f"hub.model={MODEL}"]) == 0
    settings: dict[str, Any] = {**PRETENDED, "directory": str(tmp_path / "runs"), "policy": f"hf:{MODEL}@iteration-1"}
    del settings["world"]
    settings["prompts"] = {"train": {"source": f"hf:{DATA}"}, "heldout": {"source": f"hf:{DATA}@main"}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def configured(made: HandmadeRun, tmp_path: Path) -> Path:
    """The run with a record of its last command that can be read."""
    source, rule = {"source": str(made.source)}, {"kind": "rule", "function": "embedded.reviews:well_formed"}
    settings: dict[str, Any] = {"name": "handmade", "policy": str(made.model), "scorers": {"reward": rule}}
    settings["prompts"] = {"train": source, "heldout": source}
    record = {"config": "handmade.yaml", "iterations": 2, "settings": settings}
    (made.path / "run.json").write_text(json.dumps(record))
    return made.path


def plan(config: Path, *overrides: str, download: bool = True) -> Plan:
    """What a command on it would want."""
    return plan_run(str(config), list(overrides), 1, download=download)


def claim(wanted: Plan) -> None:
    """Make its run's directory, as `pipeline run` does."""
    RunDirectory(wanted.config.run_directory).claim(
        wanted.config, Path(wanted.source), wanted.iterations, wanted.commits
    )


def test_a_tag_is_what_was_published(config: Path, hub: HubDouble, made: HandmadeRun) -> None:
    """The policy of a tag has the fingerprint of the checkpoint, and its commit is in the run's record."""
    wanted = plan(config)
    directory, commit = Path(wanted.config.policy), hub.repo(MODEL).tags["iteration-1"]
    assert directory.name == commit
    assert weights_fingerprint(directory) == Artifact.open(made.path / "iteration-001/training").manifest.weights
    claim(wanted)
    record = json.loads((wanted.config.run_directory / "run.json").read_text())
    data = hub.repo(DATA, "dataset").branches["main"]
    assert record["hub"] == {
        f"model hf:{MODEL}@iteration-1": commit,
        f"dataset hf:{DATA}": data,
        f"dataset hf:{DATA}@main": data,
    }
    assert str(wanted.config.prompts.train.source) == f"hf:{DATA}@{data}"


def test_a_run_keeps_its_commits(config: Path, hub: HubDouble) -> None:
    """What moves on the Hub changes no run that has begun; a new run takes what is there now."""
    first = plan(config)
    claim(first)
    model, data = hub.repo(MODEL), hub.repo(DATA, "dataset")
    model.tags["iteration-1"] = model.tags["iteration-2"]
    data.commit("main", data.branches["main"], "more", "", {**data.tree(), "more.txt": pointer(b"x")})
    again = plan(config)
    assert again.config.policy == first.config.policy
    assert again.config.prompts == first.config.prompts
    assert plan(config, download=False).config.policy == first.config.policy
    other = plan(config, "name=other")
    assert Path(other.config.policy).name == model.tags["iteration-2"]
    assert str(other.config.prompts.train.source) == f"hf:{DATA}@{data.branches['main']}"


def test_a_run_from_before_the_record_keeps_its_names(config: Path, hub: HubDouble) -> None:
    """A data set's name is in the keys of such a run, which stay."""
    wanted = plan(config)
    claim(wanted)
    marker = wanted.config.run_directory / "run.json"
    marker.write_text(json.dumps({k: v for k, v in json.loads(marker.read_text()).items() if k != "hub"}))
    again = plan(config)
    assert str(again.config.prompts.train.source) == f"hf:{DATA}"
    claim(again)
    assert "hub" not in json.loads(marker.read_text())


def test_offline_from_the_cache(config: Path, hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was downloaded once is found without the Hub; a dry run never asks it."""
    first = plan(config)
    hub.requests.clear()
    assert plan(config, download=False).config.policy == first.config.policy
    assert hub.requests == []
    claim(first)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = plan(config)
    assert (again.config.policy, again.config.prompts) == (first.config.policy, first.config.prompts)
    assert hub.requests == []


def test_models_of_scorers_and_of_later_iterations(config: Path, hub: HubDouble) -> None:
    """Every place that names a model takes one of the Hub."""
    settings = yaml.safe_load(config.read_text())
    settings["scorers"]["reward"] = {"kind": "reward_model", "model": f"hf:{MODEL}@iteration-2"}
    settings["changes"] = {2: {"scorers": {"reward": {"model": f"hf:{MODEL}@iteration-1"}}}}
    config.write_text(yaml.safe_dump(settings))
    wanted, tags = plan(config).config, hub.repo(MODEL).tags
    assert Path(str(wanted.scorers["reward"].model)).name == tags["iteration-2"]
    assert Path(str(wanted.at(2).scorers["reward"].model)).name == tags["iteration-1"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("policy=hf:alice/nothing", "model hf:alice/nothing is not on the Hub, or the token may not see it"),
        (f"policy=hf:{MODEL}@iteration-7", "has no revision 'iteration-7'; it has iteration-1, iteration-2, main"),
        (f"prompts.train.source=hf:{DATA}@v9", f"data set hf:{DATA}@v9: {DATA} has no revision 'v9'; it has main"),
        ("prompts.train.source=hf:alice/none", "data set hf:alice/none is not on the Hub"),
        ("policy=hf:a/b/c", "hf:a/b/c is not a valid name of a model on the Hub"),
        ("policy=hf:alice/empty", "has no file *.safetensors on the Hub"),
    ],
)
def test_mistakes(config: Path, hub: HubDouble, override: str, said: str) -> None:
    """A mistake is one message that says what there is."""
    hub.create("alice/empty")
    with pytest.raises(UserError) as refusal:
        plan(config, override)
    assert said in str(refusal.value)


def test_a_private_one_needs_a_token(config: Path, hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a token, with a stranger's, or with a wrong one, it is not there."""
    hub.tokens["hf_other"] = Account("bob", organizations=())
    for token in ("hf_other", "hf_wrong"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UserError, match="HF_TOKEN"):
            plan(config)


def test_out_of_reach(config: Path, hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network and without the model in the cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="is not in the local cache, and the Hub is out of reach"):
        plan(config)
