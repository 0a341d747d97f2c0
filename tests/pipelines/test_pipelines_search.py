"""The search of plans: it finds what looking at every plan finds, and what it proposes can be run."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from annotation.stages.score import SCORE
from contracts.config import validate
from contracts.declaration import Stage
from contracts.errors import UserError
from generation.stages.generation import GENERATION
from pipelines.config.executor import ExecutorSection
from pipelines.config.load import load_run_config
from pipelines.config.placement import PlacementSection
from pipelines.config.run import RunConfig
from pipelines.graph import Graph, Node
from pipelines.iteration import build_graph
from pipelines.planning.cluster import Cluster
from pipelines.planning.estimates import memory
from pipelines.planning.memory import Device
from pipelines.planning.prediction import Prediction
from pipelines.planning.search.comparing import SIMULATION_ERROR, PlanComparison, compare, error_of, layout_errors
from pipelines.planning.search.evaluation import (
    ImpossiblePlanError,
    PlanTable,
    SearchedRun,
    evaluate,
)
from pipelines.planning.search.exploring import explore, lower_bound
from pipelines.planning.search.finding import search_plan
from pipelines.planning.search.layouts import BEYOND_LAYERS, NO_ROOM
from pipelines.planning.search.plans import PlanChoice, jobs_section, section_of
from training.stages.critic import CRITIC
from training.stages.policy import POLICY

GIB = 1 << 30
STAGES: dict[str, Stage[Any]] = {
    "generation": GENERATION, "reward": SCORE, "reference": SCORE, "values": SCORE, "critic": CRITIC,
    "training": POLICY,
}  # fmt: skip
ROLES = tuple(STAGES)


@dataclass
class Measured:
    """Knows what stages take with so many processes, in the layouts that a plan of a few devices needs."""

    seconds: Mapping[str, list[float]]
    """By role, for one process, two, ..."""
    memory: Mapping[str, int]
    """GiB of one process of a training that is not sharded, by role; 1 of the others."""

    def predict(self, node: Node, graph: Graph) -> Prediction | None:
        """A stage without devices takes half a second."""
        if not node.stage.uses_devices(node.config):
            return Prediction(0.5, 0.0, 0.0, 0.0, 0.0, None, "measured", 0.1, "test")
        known = self.seconds[node.role]
        processes = node.stage.layout(node.config).processes
        if processes > len(known) or not is_plain(node):
            return None
        assert node.placement is not None
        cores = len(node.placement.devices) if node.placement.exclusive else 2
        alone = known[processes - 1] / (cores if self.memory.get("cores") else 1)
        gib = self.memory.get(node.role, 1)
        return Prediction(alone, 0.0, 0.0, 0.0, 0.0, gib * GIB, "measured", 0.1, "test")


def is_plain(node: Node) -> bool:
    """Whether a training is neither sharded nor divided, with the micro-batch of its config."""
    config = node.config.model_dump()
    parallel = config.get("parallel")
    if parallel is None:
        return True
    return parallel["zero"] == 0 and config["micro_batch_tokens"] == 16384 and not config["gradient_checkpointing"]


def setting_of(path: Path, roles: Sequence[str], predictor: Any, gpus: int, cores: int, gib: int) -> SearchedRun:
    """One iteration of these roles alone, with models of which only the predictor knows."""
    graph, models = Graph(path.parent / "run"), path.parent / "models"
    experience, rollouts, last = models / "experience", models / "rollouts", None
    for role in sorted(roles, key=ROLES.index):
        fields: dict[str, Any] = {
            "generation": {
                "policy": models / "policy",
                "prompts": models / "prompts",
                "count": 6,
                "shard_size": 2,
            },
            "reward": {"kind": "reward_model", "model": models / "reward", "rollouts": rollouts},
            "reference": {"kind": "logprobs", "model": models / "policy", "rollouts": rollouts},
            "values": {"kind": "values", "model": models / "critic", "rollouts": rollouts},
            "critic": {"model": models / "critic", "experience": experience},
            "training": {"model": models / "policy", "experience": experience, "algorithm": "ppo"},
        }[role]
        is_training = role in ("critic", "training")
        made = graph.add(STAGES[role], role, fields, iteration=1, after=last if is_training else None)
        rollouts = made if role == "generation" else rollouts
        last = last if is_training else f"iteration-001/{role}"
    return SearchedRun(
        config=load_run_config(path, []),
        graph=graph,
        predictor=predictor,
        device=Device("test", gib * GIB, gpus),
        cluster_of=lambda config: machine(config, gpus, cores),
    )


def machine(config: RunConfig, gpus: int, cores: int) -> Cluster:
    return Cluster(validate(ExecutorSection, {}, "executor"), config.placement, gpus, cores, parallel=1 if gpus else 2)


def every_section(setting: SearchedRun, devices: int) -> Iterator[PlacementSection]:
    """All that can be said, written without the search: pools, who is in which, how many processes."""
    roles = list(dict.fromkeys(node.role for node in setting.graph.nodes.values()))
    keys = {role: "dp" if role in ("training", "critic") else "replicas" for role in roles}
    layouts = [[{}, *({keys[role]: count} for count in range(1, devices + 1))] for role in roles]
    for *chosen, streaming in itertools.product(*layouts, (False, True)):
        named = {f"[{role[0]}]{role[1:]}": {"layout": layout} for role, layout in zip(roles, chosen, strict=True)}
        for strategy in ("flattening", "interleaving"):
            data = {"strategy": strategy, "streaming": streaming, "stages": named}
            yield validate(PlacementSection, data, "test")
        for count in range(1, devices + 1):
            for sizes in itertools.product(range(1, devices + 1), repeat=count):
                if sum(sizes) != devices:
                    continue
                for places in itertools.product([None, *range(count)], repeat=len(roles)):
                    if not set(range(count)) <= set(places):
                        continue
                    stages = {
                        key: {**entry, **({} if place is None else {"pool": f"p{place}"})}
                        for (key, entry), place in zip(named.items(), places, strict=True)
                    }
                    pools = {f"p{number}": size for number, size in enumerate(sizes)}
                    data = {"strategy": "interleaving", "streaming": streaming, "pools": pools, "stages": stages}
                    yield validate(PlacementSection, data, "test")


def brute_force(setting: SearchedRun, devices: int) -> float:
    """The least that any of them takes."""
    least = math.inf
    for section in every_section(setting, devices):
        try:
            least = min(least, evaluate(setting, section).seconds)
        except ImpossiblePlanError:
            continue
    return least


SECONDS = st.lists(st.integers(1, 9).map(float), min_size=1, max_size=3)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), on_gpu=st.booleans(), few=st.sampled_from([0, 5000]))
def test_it_finds_what_looking_at_every_plan_finds(
    shared_smallest: Path, data: st.DataObject, on_gpu: bool, few: int
) -> None:
    devices = data.draw(st.integers(1, 3), label="devices")
    number = 2 if devices == 3 else 3
    others = data.draw(st.permutations(ROLES[1:]), label="roles")
    roles = [*(ROLES[:1] if data.draw(st.booleans(), label="generation") else []), *others][:number]
    seconds = {role: data.draw(SECONDS, label=role) for role in roles}
    memory = {role: data.draw(st.sampled_from([1, 2, 5]), label=f"memory of {role}") for role in roles}
    memory |= {} if on_gpu else {"cores": 1}
    setting = setting_of(shared_smallest, tuple(roles), Measured(seconds, memory), devices if on_gpu else 0, devices, 8)
    table = PlanTable(setting)
    found = explore(table, seed=1, few=few)
    least = brute_force(setting, devices)
    if found.plan is None:
        assert least == math.inf
        return
    cost = table.cost(found.plan)
    assert cost is not None
    assert cost[0] == pytest.approx(least)
    assert lower_bound(table) <= least + 1e-6
    proposed = evaluate(setting, section_of(found.plan, table.roles, 0))
    assert proposed.seconds == pytest.approx(least), "what it says is what the section says"


@pytest.mark.parametrize(
    ("gib", "streaming", "seconds"), [(10, True, 6.0), (8, False, 10.0)], ids=["room for both", "for one alone"]
)
def test_a_scorer_streams_where_that_is_faster_and_both_have_room_at_the_same_time(
    shared_smallest: Path, gib: int, streaming: bool, seconds: float
) -> None:
    measured = Measured({"generation": [4.0], "reward": [6.0]}, {"generation": 5, "reward": 4})
    setting = setting_of(shared_smallest, ("generation", "reward"), measured, 0, 2, gib)
    table = PlanTable(setting)
    found = explore(table)
    assert found.plan is not None
    assert (found.plan.streaming, table.cost(found.plan)[0]) == (streaming, seconds)  # type: ignore[index]
    section = validate(PlacementSection, {"streaming": True}, "test")
    if streaming:
        assert evaluate(setting, section).seconds == seconds
    else:
        with pytest.raises(ImpossiblePlanError, match=r"at the same time need 9\.0 GiB together of 8\.0 GiB"):
            evaluate(setting, section)


@dataclass
class Jobs(Measured):
    """The same stages as jobs: each waits in the queue, and arrays have a further job that publishes."""

    queue: float = 0.0
    finish: float = 0.0

    def predict(self, node: Node, graph: Graph) -> Prediction | None:
        """What it takes, its queue, and what finishes it."""
        found = super().predict(node, graph)
        finish = self.finish if node.workload in ("generation", "scoring") else 0.0
        return None if found is None else replace(found, queue=self.queue, finish=finish)


def on_scheduler(
    setting: SearchedRun, gpus: int, *, detached: bool = False, parallel: int | None = None
) -> SearchedRun:
    executor = {"kind": "slurm", "parallel": parallel, "resources": {"gpus": gpus}}
    config = setting.config.model_copy(update={"executor": validate(ExecutorSection, executor, "executor")})
    return replace(
        setting,
        config=config,
        cluster_of=lambda config: Cluster(config.executor, config.placement, 0, 2, parallel=2),
        detached=detached,
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), gpus=st.integers(1, 3), detached=st.booleans(), few=st.sampled_from([0, 5000]))
def test_of_a_schedulers_jobs_it_finds_what_trying_all_layouts_finds(
    shared_smallest: Path, data: st.DataObject, gpus: int, detached: bool, few: int
) -> None:
    others = data.draw(st.permutations(ROLES[1:]), label="roles")
    roles = ("generation", *others[:3])
    seconds = {role: data.draw(SECONDS, label=role) for role in roles}
    gib = {role: data.draw(st.sampled_from([1, 2, 5, 9]), label=f"memory of {role}") for role in roles}
    jobs = Jobs(seconds, gib, *data.draw(st.tuples(st.integers(0, 5), st.integers(0, 5)), label="queue, finish"))
    parallel = None if detached else data.draw(st.sampled_from([None, 1, 2]), label="at once")
    setting = setting_of(shared_smallest, roles, jobs, 1, 1, 8)
    setting = on_scheduler(setting, gpus, detached=detached, parallel=parallel)
    table = PlanTable(setting)
    found = explore(table, few=few)
    trainings = [role for role in roles if role in ("training", "critic")]
    least = math.inf
    for *counts, streaming in itertools.product(*[[None, *range(1, gpus + 1)]] * len(trainings), (False, True)):
        layouts = {
            f"[{role[0]}]{role[1:]}": {"layout": {} if count is None else {"dp": count}}
            for role, count in zip(trainings, counts, strict=True)
        }
        try:
            section = validate(PlacementSection, {"streaming": streaming, "stages": layouts}, "test")
            least = min(least, evaluate(setting, section).seconds)
        except ImpossiblePlanError:
            continue
    if found.plan is None:
        assert least == math.inf
        return
    cost = table.cost(found.plan)
    assert cost is not None
    assert cost[0] == pytest.approx(least)
    assert lower_bound(table) <= least + 1e-6
    assert not (detached and found.plan.streaming), "jobs that wait for the end of others"
    streaming = found.plan.streaming
    proposed = evaluate(setting, jobs_section(found.plan, table.roles, setting.config.placement, streaming=streaming))
    assert proposed.seconds == pytest.approx(least), "what it says is what the section says"
    assert proposed.memory <= 8 * GIB


def test_stages_of_this_machine_are_searched_beside_those_of_a_scheduler(shared_smallest: Path) -> None:
    measured = Measured({"generation": [4.0], "reward": [6.0, 3.5], "critic": [5.0, 3.0], "training": [5.0, 3.0]}, {})
    setting = setting_of(shared_smallest, ("generation", "reward", "critic", "training"), measured, 2, 2, 8)
    executor = validate(ExecutorSection, {"stages": {"generation": "slurm"}}, "executor")
    setting = replace(
        setting,
        config=setting.config.model_copy(update={"executor": executor}),
        cluster_of=lambda config: Cluster(config.executor, config.placement, 2, 2, parallel=1),
    )
    table = PlanTable(setting)
    assert {role.name for role in table.roles} == {"reward", "critic", "training"}
    plans = {
        PlanChoice(True, (1, 1), places, tuple(option[0].layout for option in options))
        for places in ((0, 1, 1), (1, 0, 0))
        if (options := table.options_of(PlanChoice(True, (1, 1), places, ((),) * 3)))
    }
    for plan in plans:
        cost = table.cost(plan)
        assert cost is not None
        assert evaluate(setting, section_of(plan, table.roles, 0)).seconds == pytest.approx(cost[0])


def test_the_queue_of_every_job_and_of_those_that_finish_arrays_is_in_the_plan(shared_smallest: Path) -> None:
    measured = Jobs({"generation": [4.0], "reward": [6.0], "training": [5.0, 3.0]}, {}, queue=10.0, finish=2.0)
    setting = setting_of(shared_smallest, ("generation", "reward", "training"), measured, 1, 1, 8)
    setting = on_scheduler(setting, 2)
    run = evaluate(setting, PlacementSection())
    assert run.seconds == (10 + 4 + 2) + (10 + 6 + 2) + (10 + 3), "one after another, each with its queue"
    assert error_of(run) > 0.5 * 34, "a queue is never known as well as what stages take"
    held = 4 * 4 + 4 * 6 + 2 * 3
    assert run.device_hours == pytest.approx(held / 3600), "four tasks of each array, two GPUs of the training's node"
    pools = {"generation": {"partition": "l40s"}, "training": {"partition": "h100"}}
    written = validate(PlacementSection, {"strategy": "separation", "pools": pools}, "test")
    answer = search_plan(replace(setting, config=setting.config.model_copy(update={"placement": written})))
    assert answer.fixed.keys() == {"as written"}
    assert answer.found is not None
    assert answer.found.section.pools == written.pools, "where its jobs go is left as it is"
    assert answer.found.section.streaming, "the scorer waits in the queue while the generation computes"
    assert answer.found.seconds < answer.fixed["as written"].seconds


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
WORK = {"generation": 3e5, "reward": 4e4, "reference": 4e4, "values": 4e4, "critic": 3e5, "training": 4e5}
"""Device-seconds of an iteration."""


class Scaling:
    """Stages that scale worse the more processes there are, and worst where these talk in every layer."""

    def predict(self, node: Node, graph: Graph) -> Prediction:
        """A fixed cost of half a minute, and the work of its role."""
        if not node.stage.uses_devices(node.config):
            return Prediction(5.0, 0.0, 0.0, 0.0, 0.0, None, "measured", 0.05, "test")
        config = node.config.model_dump()
        processes = node.stage.layout(node.config).processes * max(1, node.gpus)
        slower = 1.0
        if (parallel := config.get("parallel")) is not None:
            slower += 0.02 * (parallel["tp"] - 1) + 0.03 * (parallel["pp"] - 1) + 0.03 * (parallel["sp"] - 1)
            slower += 0.1 * (parallel["zero"] in (3, "fsdp2")) + 0.5 * len(parallel["offload"])
            slower *= 1.3 if config["gradient_checkpointing"] else 1.0
            slower *= 1 + 2048 / config["micro_batch_tokens"]
        compute = WORK[node.role.rpartition("/")[2]] * slower / processes**0.9
        return Prediction(compute, 15.0, 5.0, 10.0, 0.0, None, "analytic", 0.1, "test")


def large(folder: Path, gpus: int = 128, *more: str, iterations: int = 3) -> SearchedRun:
    """PPO of an 8B model with a critic of its own, on as many GPUs of 80 GiB."""
    for name in ("policy", "reward", "critic"):
        (folder / name).mkdir(exist_ok=True, parents=True)
        head = "ForCausalLM" if name == "policy" else "ForSequenceClassification"
        (folder / name / "config.json").write_text(json.dumps(LLAMA | {"architectures": [f"Llama{head}"]}))
    overrides = [
        f"policy={folder}/policy", f"scorers.reward.model={folder}/reward", f"critic.start={folder}/critic",
        "training.parallel={zero: fsdp2}", "critic.parallel={zero: fsdp2}", *more,
    ]  # fmt: skip
    config = load_run_config("llama3-8b-ppo", overrides)
    return SearchedRun(
        config=config,
        graph=build_graph(config, iterations),
        predictor=Scaling(),
        device=Device(f"{gpus} GPU of 80 GiB", 80 * GIB, gpus),
        cluster_of=lambda config: machine(config, gpus, 64),
    )


@pytest.mark.slow
def test_it_is_never_worse_than_a_strategy_by_itself_and_says_how_far_the_bound_is(tmp_path: Path) -> None:
    answer = search_plan(large(tmp_path, 8), seed=3)
    assert answer.found is not None
    assert answer.fixed.keys() == {"flattening", "interleaving", "separation", "colocated"}
    assert "lag" in answer.impossible["async"]
    assert all(answer.found.seconds <= run.seconds + 1e-6 for run in answer.fixed.values())
    assert answer.cautious is not None
    assert answer.found.seconds <= answer.cautious.seconds <= min(run.seconds for run in answer.fixed.values()) + 1e-6
    assert answer.searched_seconds is not None
    assert answer.bound <= answer.searched_seconds
    again = search_plan(large(tmp_path, 8), seed=3)
    assert again.found is not None
    assert again.found.section == answer.found.section, "the same seed, the same plan"


@pytest.mark.slow
def test_no_plan_needs_more_memory_than_there_is(tmp_path: Path) -> None:
    setting = replace(large(tmp_path, 8), device=Device("8 GPU of 40 GiB", 40 * GIB, 8))
    answer = search_plan(setting, seed=0)
    assert answer.left_out[NO_ROOM] > 0
    for node in answer.adopted.simulation.order:
        estimate = memory(node, setting.graph, on_gpu=True)
        if node.stage.uses_devices(node.config):
            assert estimate is not None
            assert estimate.total <= estimate.share * 40 * GIB, node.name
    with pytest.raises(UserError, match=r"no plan fits this run:\n  .* needs .* of 5\.4 GiB on a small GPU"):
        search_plan(replace(setting, device=Device("a small GPU", 6 * GIB, 8)))


def test_what_stays_loaded_has_to_fit_together(shared_smallest: Path) -> None:
    roles = ("generation", "reward", "training")
    measured = Measured({role: [1.0] for role in roles}, {"generation": 4, "reward": 4, "training": 3})
    fitting, small = (setting_of(shared_smallest, roles, measured, 1, 1, gib) for gib in (11, 10))
    for setting in (fitting, small):
        assert evaluate(setting, PlacementSection()).seconds == 3.0
    assert evaluate(fitting, PlacementSection(strategy="colocated")).seconds == 3.0
    with pytest.raises(ImpossiblePlanError, match=r"what stays loaded needs 11\.0 GiB together of 10\.0 GiB"):
        evaluate(small, PlacementSection(strategy="colocated"))


def test_a_layout_is_proposed_only_if_the_model_can_take_it(tmp_path: Path) -> None:
    table = PlanTable(large(tmp_path, 16))
    training = next(role for role in table.roles if role.name == "training")
    layouts = [dict(option.layout) for option in table.options.of(training, 16, True)]
    assert any(layout.get("dp") == 16 for layout in layouts)
    assert all(8 % (layout.get("tp", 1) * layout.get("sp", 1)) == 0 for layout in layouts), "8 key-value heads"
    assert table.options.left_out["training"][BEYOND_LAYERS] > 0
    for option in table.options.of(training, 12, True):
        assert option.nodes[0].stage.layout(option.nodes[0].config).processes <= 12


class Seen(Scaling):
    """The same, as if all of it had been run."""

    def predict(self, node: Node, graph: Graph) -> Prediction:
        """Measured."""
        return replace(super().predict(node, graph), basis="measured")


class Forgetful(Scaling):
    """Knows nothing of some role."""

    def __init__(self, role: str) -> None:
        self.role = role

    def predict(self, node: Node, graph: Graph) -> Prediction | None:
        return None if node.role == self.role else super().predict(node, graph)


@pytest.mark.parametrize("role", ["reference", "experience"])
def test_a_stage_of_unknown_cost_is_named_and_not_counted_as_nothing(tmp_path: Path, role: str) -> None:
    setting = replace(large(tmp_path, 4), predictor=Forgetful(role))
    with pytest.raises(UserError, match=rf"there is no prediction for iteration-00\d/{role}"):
        search_plan(setting)


@pytest.mark.slow
def test_errors_that_both_plans_have_cancel_and_others_do_not(tmp_path: Path) -> None:
    guessed = large(tmp_path, 8, "lag=1", "training.algorithm=decoupled_ppo", iterations=4)
    setting = replace(guessed, predictor=Seen())
    layouts = {"training": {"layout": {"dp": 4}}, "generation": {"layout": {"replicas": 4}}}
    pools = {"generation": 4, "training": 4}
    sections = [
        validate(PlacementSection, {"strategy": strategy, "pools": pools, "stages": stages}, "test")
        for strategy, stages in (
            ("async", layouts),
            ("separation", layouts),
            ("interleaving", {**layouts, "critic": "generation", "[g]eneration": {"layout": {"replicas": 2}}}),
        )
    ]
    runs = [evaluate(setting, section) for section in sections]
    same = compare(runs[0], runs[1])
    assert same.gain == 0, "the same by another name"
    assert same.error == pytest.approx(math.sqrt(2) * SIMULATION_ERROR * runs[0].seconds, rel=0.2), (
        "nothing else is left"
    )
    assert same.error < error_of(runs[0])
    assert compare(runs[0], runs[0]) == PlanComparison(0.0, 0.0, 0.0)
    assert layout_errors(runs[0]).keys() == layout_errors(runs[1]).keys() != layout_errors(runs[2]).keys()
    other = compare(runs[2], runs[0])
    assert other.error > same.error
    unseen = compare(evaluate(guessed, sections[2]), evaluate(guessed, sections[0]))
    assert unseen.gain == other.gain
    assert unseen.error > other.error, "a layout that no run has shown is trusted less"


@pytest.mark.slow
def test_a_plan_is_adopted_only_if_it_is_better_by_more_than_the_error(tmp_path: Path) -> None:
    class Sure(Seen):
        error = 0.005

        def predict(self, node: Node, graph: Graph) -> Prediction:
            return replace(super().predict(node, graph), error=self.error)

    class Unsure(Sure):
        error = 2.0

    class Guessed(Scaling):
        def predict(self, node: Node, graph: Graph) -> Prediction:
            return replace(super().predict(node, graph), error=0.5)

    narrow = ["training.parallel={dp: 8, zero: 1}", "critic.parallel={dp: 8, zero: 1}"]
    setting = large(tmp_path, 16, *narrow)
    sure, unsure = (search_plan(replace(setting, predictor=predictor), seed=1) for predictor in (Sure(), Unsure()))
    assert sure.found is not None
    assert unsure.found is not None
    assert sure.found.section == unsure.found.section
    assert (sure.name, unsure.name) == ("found", "flattening")
    assert "it is expected to be" in sure.reason
    assert "95% are required" in unsure.reason
    guessed = search_plan(replace(setting, predictor=Guessed()), seed=1)
    assert guessed.name == "cautious", "a layout that nobody has run has to promise more than other pools"
    assert guessed.cautious is not None
    assert guessed.cautious.shapes.items() <= {item for run in guessed.fixed.values() for item in run.shapes.items()}
