"""`pipeline run` refuses what a later stage would refuse before the first one starts, and nothing is left behind."""

import json
import shutil
from pathlib import Path

import pytest

from contracts.conversation_samples import SamplingRequest, sample
from pipelines.config.load import load_run_config
from pipelines.iteration import build_graph
from pipelines.main import main
from pipelines.planning.inspection import (
    differing_probes,
    differing_vocabularies,
    request_of,
    requests_of,
    scorers_without_answers,
    too_small_sets,
)

pytestmark = pytest.mark.usefixtures("warm_asking")

SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "review the film:"}]}
PLAIN = {"messages": [{"role": "user", "content": "review the book:"}]}
REFUSAL = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_template_that_refuses_a_turn_of_the_data(
    smallest: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(world, smallest.parent / "model"))
    template = model / "chat_template.jinja"
    template.write_text(REFUSAL + template.read_text())
    train = write(smallest.parent / "train.jsonl", *[PLAIN] * 1, SYSTEM)
    heldout = write(smallest.parent / "heldout.jsonl", {"prompt": "review the meal:"})
    command = [
        "run", str(smallest), f"policy={model}", "sft=null", "reward_model=null", "--iters", "1",
        "scorers.reward={kind: rule, function: embedded.reviews:well_formed}", "prompts.per_iteration=2",
        f"prompts.train.source={train}", f"prompts.heldout.source={heldout}",
    ]  # fmt: skip
    for extra in ([], ["--dry-run"]):
        assert main([*command, *extra]) == 2
        message = capsys.readouterr().err
        assert f"{train}, line 2" in message
        assert "no system role" in message
    assert not (smallest.parent / "runs").exists()


def test_environments_that_read_one_tokenizer_differently() -> None:
    text = "two words"
    one = [{"text": text, "ids": [1, 2], "decoded": text}]
    other = [{"text": text, "ids": [1, 3], "decoded": "twowords"}]
    assert differing_probes({"generation": {"m": one}, "annotation": {"m": one}, "training": {}}) == []
    (finding,) = differing_probes({"generation": {"m": other}, "annotation": {"m": one}})
    assert finding.level == "error"
    assert "'twowords'" in finding.found
    assert "m: the environments generation and annotation read its tokenizer differently" in finding.found


def test_stages_that_are_alike_are_asked_about_once(smallest: Path, world: Path) -> None:
    config = load_run_config(smallest, [f"policy={world}", "sft=null"])
    few, many = (build_graph(config, iterations) for iterations in (2, 9))
    for package in ("generation", "annotation", "training"):
        assert len(requests_of(few, package)) == len(requests_of(many, package))
    # A policy of the run's own is known by the model that it is trained from.
    request = request_of(many.nodes["iteration-009/training"], many)
    assert request.config["model"] == str(world)
    assert request.made == ("model",)


def test_a_critic_that_reads_other_tokens(smallest: Path, world: Path) -> None:
    critic = smallest.parent / "critic"
    overrides = [f"policy={world}", "sft=null", "training.algorithm=ppo", f"critic={{start: {critic}}}"]
    graph = build_graph(load_run_config(smallest, overrides), 2)
    assert differing_vocabularies(graph, {str(world): "a" * 64, str(critic): "a" * 64}) == []
    (finding,) = differing_vocabularies(graph, {str(world): "a" * 64, str(critic): "b" * 64})
    assert finding.level == "error"
    assert f"{critic} (stage iteration-001/values) has another vocabulary" in finding.found


def test_a_judge_reads_no_files_and_is_asked_before_a_run(smallest: Path) -> None:
    """Its model is a name, not a directory; a template of the user's is found from where the command is given."""
    judge = "scorers.reward={kind: judge, url: 'http://127.0.0.1:9/v1', model: some/model, template_file: question.txt}"
    graph = build_graph(load_run_config(str(smallest), [judge, "reward_model=null"]), 1)
    config = graph.nodes["iteration-001/reward"].config
    assert (config.model, config.template_file) == ("some/model", Path("question.txt").absolute())
    asked = [request.config for request in requests_of(graph, "annotation")]
    assert "some/model" in [config.get("model") for config in asked]


def test_prompts_without_the_answer_that_a_scorer_judges_by(
    smallest: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(smallest.parent / "train.jsonl", *({"prompt": f"review {n}:", "gold": "great"} for n in range(3)))
    heldout = write(smallest.parent / "heldout.jsonl", {"prompt": "review the meal:", "answer": "great"})
    command = [
        "run", str(smallest), f"policy={world}", "sft=null", "reward_model=null", "--iters", "1", "--dry-run",
        "scorers.reward={kind: exact_match}", "prompts.per_iteration=2", f"prompts.train.source={train}",
        f"prompts.heldout.source={heldout}",
    ]  # fmt: skip
    assert main(command) == 2
    message = capsys.readouterr().err
    assert (
        f"scorer 'reward': kind=exact_match needs the prompt's known `answer`, which no prompt of {train} has."
        in message
    )
    assert "answer_column=COLUMN" in message
    assert str(heldout) not in message
    assert main([*command, "prompts.train.answer_column=gold"]) == 0


def test_a_mixture_needs_an_answer_in_one_of_its_sets(smallest: Path, world: Path) -> None:
    sets = ", ".join(f"{name}: {{source: {smallest.parent / name}.jsonl}}" for name in ("one", "other"))
    overrides = [
        f"policy={world}", "sft=null", "reward_model=null", "scorers.reward={kind: exact_match}", "prompts.train=null",
        f"prompts.mixture={{{sets}}}", f"prompts.heldout.source={smallest.parent}/heldout.jsonl",
    ]  # fmt: skip
    graph = build_graph(load_run_config(smallest, overrides), 2)
    imports = [node.name for node in graph.nodes.values() if node.stage.command == "prompts"]
    names = [name for name in imports if "heldout" not in name]
    assert len(names) == 2
    assert list(scorers_without_answers(graph, names[:1])) == []
    (finding,) = dict.fromkeys(scorers_without_answers(graph, names))
    assert "/one.jsonl and " in finding.found
    assert list(scorers_without_answers(graph, [])) == []


def mixture(folder: Path, source: object, count: int, **keys: str) -> list[str]:
    """Overrides for a run that takes a third of its prompts from a source."""
    own = "".join(f", {key}: {value}" for key, value in keys.items())
    return [
        "sft=null", "reward_model=null", "scorers={reward: {kind: repetition}}", f"prompts.per_iteration={count}",
        "prompts.train=null", "prompts.mixture.many={source: 'world:train.jsonl', weight: 2}",
        f"prompts.heldout.source={write(folder / 'heldout.jsonl', {'prompt': 'so?'})}",
        f"prompts.mixture.few={{source: '{source}', duplicates: drop{own}}}",
    ]  # fmt: skip


FEW = [{"prompt": f"review {n}:"} for n in (0, 1, 1)]


def test_a_set_of_a_mixture_that_is_too_small(smallest: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a data set of the Hub, in the local cache."""
    (smallest.parent / "hub").mkdir()
    write(smallest.parent / "hub/train.jsonl", *FEW)
    overrides = mixture(smallest.parent, f"hf:{smallest.parent}/hub", 9)
    assert main(["run", str(smallest), "--iters", "1", "--dry-run", f"policy={world}", *overrides]) == 2
    assert "source few has 2 prompts, but its share of count=9 is 3, and no prompt" in capsys.readouterr().err


def test_prompts_are_counted_for_what_iterations_draw(smallest: Path) -> None:
    source = write(smallest.parent / "few.jsonl", *FEW)

    def found(count: int, **keys: str) -> list[str]:
        overrides = mixture(smallest.parent, source, count, **keys)
        graph = build_graph(load_run_config(smallest, overrides), 3)
        stage = request_of(graph.nodes["prompts/train/few"], graph)
        counts = sample(SamplingRequest((stage,))).counts
        return [finding.found for finding in too_small_sets(graph, counts)]

    assert found(6) == []
    (text,) = found(9)
    assert text.startswith("source few has 2 prompts, but its share of count=9 is 3")
    (text,) = found(4, limit="1")  # of the second iteration
    assert text.startswith("source few has 1 prompts, but its share of count=4 is 2")
    assert found(48)[0].startswith("source many has 24 prompts, but its share of count=48 is 32")


def test_a_mark_that_no_answer_has_because_there_is_none(smallest: Path) -> None:
    overrides = mixture(smallest.parent, write(smallest.parent / "few.jsonl", *FEW), 6, answer_after="'####'")
    graph = build_graph(load_run_config(smallest, overrides), 1)
    stage = request_of(graph.nodes["prompts/train/few"], graph)
    (finding,) = sample(SamplingRequest((stage,))).findings
    assert (finding.level, "no row has an answer, so answer_after='####' does not apply" in finding.found) == (
        "error",
        True,
    )


def test_scorers_by_answers_on_prompts_of_the_toy_task_and_of_the_hub(
    smallest: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "run", str(smallest), "reward_model=null", "--iters", "1", "--dry-run",
        "scorers={reward: {kind: exact_match}}",
    ]  # fmt: skip
    assert main(command) == 2
    assert "which no prompt of world:train.jsonl has" in capsys.readouterr().err
    (smallest.parent / "hub").mkdir()
    write(smallest.parent / "hub/train.jsonl", {"prompt": "so?"}, {"prompt": "and?"})
    source = f"hf:{smallest.parent}/hub"
    assert main([*command, f"prompts.train.source={source}"]) == 2
    assert f"which no prompt of {source} has" in capsys.readouterr().err
