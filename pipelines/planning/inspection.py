"""The driver's part of preflight: asks every environment what its stages would refuse, before the first one starts.

Results without errors are cached, keyed by the state of the files that were read, so that repeating a command costs
nothing.
"""

import concurrent.futures
import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from annotation.scorers.base import ANSWER_FIX, ScoreConfig
from contracts.config import Role
from contracts.conversation_samples import SampledData, SamplingRequest
from contracts.errors import UserError
from contracts.files import exists_or_matches, write_atomically
from contracts.fingerprint import digest
from contracts.mixture import DrawConfig, next_sources, too_few_prompts
from contracts.nested import leaves
from contracts.preflight import Conversation, Finding, PreflightReport, PreflightRequest, StageRequest
from contracts.records import Message
from contracts.sources import HUB, hub_parts
from contracts.versions import source_version
from pipelines.config.sections import EnvironmentsSection
from pipelines.environments.launch import ask, probe_versions
from pipelines.environments.paths import home
from pipelines.graph import Graph, Node
from pipelines.planning.preflight import origin_of
from pipelines.progress import waiting

R = TypeVar("R", PreflightReport, SampledData)
DRAWS = 16
"""Number of iterations whose draws are checked; the prompts that each takes from a set differ by one at most."""
IGNORED_FIELDS = ("output", "seed", "iteration", "start", "count", "lengths")
"""Fields that do not matter to preflight; stages that differ only in these are checked once."""


def preflight(graph: Graph, environments: EnvironmentsSection) -> list[Finding]:
    """The findings of all environments about their stages, without duplicates."""
    needed = dict.fromkeys(["annotation", *(node.environment for node in graph.nodes.values() if node.stage.preflight)])
    usable = [name for name in needed if _is_usable(environments, name)]
    sampled = _sample(graph, environments) if "annotation" in usable else SampledData()
    conversations = (*sampled.conversations, *system_message_conversations(graph))
    findings = [
        *sampled.findings,
        *scorers_without_answers(graph, sampled.unanswered),
        *too_small_sets(graph, sampled.counts),
    ]
    requests = {name: stages for name in usable if (stages := requests_of(graph, name))}
    with concurrent.futures.ThreadPoolExecutor(max(1, len(requests))) as pool:
        answers = pool.map(
            lambda name: _answer(
                environments, name, "contracts.preflight", PreflightRequest(requests[name], conversations),
                PreflightReport, _sources(graph, name), keep=not _servers(graph, name),
            ),
            requests,
        )  # fmt: skip
        with waiting(f"checking models and data in the environments of {', '.join(requests)}"):
            reports = dict(zip(requests, answers, strict=True))
    for report in reports.values():
        findings += report.findings
    findings += differing_probes({name: report.probes for name, report in reports.items()})
    known = {model: found for report in reports.values() for model, found in report.vocabularies.items()}
    findings += differing_vocabularies(graph, known)
    return list(dict.fromkeys(findings))


def differing_probes(probes: dict[str, dict[str, Any]]) -> list[Finding]:
    """Find models whose tokenizer two environments read differently.

    Args:
        probes: by environment and model, the result of tokenizing the same texts.
    """
    findings = []
    for model in dict.fromkeys(model for made in probes.values() for model in made):
        seen = [(name, made[model]) for name, made in probes.items() if model in made]
        first, expected = seen[0]
        for name, found in seen[1:]:
            if found != expected:
                ours, theirs = next((a, b) for a, b in zip(expected, found, strict=True) if a != b)
                findings.append(
                    Finding(
                        "error",
                        f"{model}: the environments {first} and {name} read its tokenizer differently: of "
                        f"{ours['text']!r} the first makes {_shown(ours)}, the second {_shown(theirs)}.",
                        "Use the locked environments (pipeline env sync), or environments with one version of "
                        "transformers and tokenizers.",
                    )
                )
    return findings


def differing_vocabularies(graph: Graph, known: dict[str, str]) -> list[Finding]:
    """Find reference models and critics that would read token ids of another vocabulary.

    Args:
        known: by the path of a model, the digest of its vocabulary.
    """
    reported: dict[tuple[Path, Path], Finding] = {}
    for node in graph.nodes.values():
        reads = next((use for use in node.stage.models(node.config) if use.ids_of is not None), None)
        sampled = graph.sampler(reads.ids_of) if reads is not None and reads.ids_of is not None else None
        if reads is None or sampled is None or not (samplers := sampled.stage.models(sampled.config)):
            continue
        model, policy = origin_of(reads.path, graph), origin_of(samplers[0].path, graph)
        found, wanted = known.get(str(model)), known.get(str(policy))
        if found is not None and wanted is not None and found != wanted:
            text = (
                f"{model} (stage {node.name}) has another vocabulary ({found[:12]}) than the policy {policy} "
                f"({wanted[:12]}), whose answers it would read: the same token ids mean other text to it."
            )
            reported.setdefault(
                (model, policy), Finding("error", text, "Take a model that has the policy's tokenizer.")
            )
    return list(reported.values())


def _shown(probe: dict[str, Any]) -> str:
    ids = ", ".join(map(str, probe["ids"][:12])) + (" ..." if len(probe["ids"]) > 12 else "")
    return f"the ids {ids}, which it decodes to {probe['decoded']!r}"


def requests_of(graph: Graph, environment: str) -> tuple[StageRequest, ...]:
    """The stages of an environment that read external files or ask servers, without duplicates."""
    found: dict[str, StageRequest] = {}
    for node in graph.nodes.values():
        if node.environment == environment and node.stage.preflight and reads_from_outside(node, graph):
            request = request_of(node, graph)
            found.setdefault(digest([request.package, request.command, request.config, sorted(request.made)]), request)
    return tuple(found.values())


def reads_from_outside(node: Node, graph: Graph) -> bool:
    """Whether a node reads anything that exists before the run, or sends requests to a server."""
    try:
        if node.config.source_files() or node.config.server_urls():
            return True
    except UserError:  # reported by `input_mistakes`
        return False
    return any(
        exists_or_matches(origin_of(path, graph)) and graph.producer_name(origin_of(path, graph)) is None
        for path in node.config.input_paths()
    )


def request_of(node: Node, graph: Graph) -> StageRequest:
    """A node's config as it is sent to its environment: inputs made in the run are replaced by placeholders
    (`_stand_in`)."""
    config = node.config.model_dump(mode="json")
    made = []
    for field, value in node.config.select(Role.INPUT).items():
        if isinstance(value, str) and graph.producer_name(Path(value)) is not None:
            made.append(field)
            config[field] = _stand_in(Path(value), graph)
        elif isinstance(value, list | dict):
            config[field] = _replaced(config[field], graph)
    for field in IGNORED_FIELDS:
        config.pop(field, None)
    command = node.stage.command
    return StageRequest(node.name, node.package, command, {**config, "output": "preflight"}, tuple(made))


def _replaced(value: Any, graph: Graph) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, graph) for key, item in value.items()}
    if isinstance(value, list):
        return list(dict.fromkeys(_replaced(item, graph) for item in value))
    return _stand_in(Path(value), graph)


def _stand_in(path: Path, graph: Graph) -> str:
    """The path; for a model trained in the run the model that it starts from, and for other artifacts the kind of their
    stage."""
    origin = origin_of(path, graph)
    owner = graph.producer_name(origin)
    return str(origin) if owner is None else f"made-by/{graph.nodes[owner].stage.name}"


def _is_usable(environments: EnvironmentsSection, name: str) -> bool:
    """Whether an environment can be used; if not, `check_environments` reports why."""
    try:
        probe_versions(environments.of(name), name)
    except (UserError, OSError):
        return False
    return True


def system_message_conversations(graph: Graph) -> Iterator[Conversation]:
    """Yield a conversation for each system message in the run's config."""
    for node in graph.nodes.values():
        if (system := getattr(node.config, "system", None)) is not None:
            messages = (Message("system", system), Message("user", "What is the capital of France?"))
            yield Conversation(f"{node.name} with its system message", "prompts", messages)


def _sample(graph: Graph, environments: EnvironmentsSection) -> SampledData:
    """Sample conversations from the user's local data, in the annotation environment."""
    requests: dict[str, StageRequest] = {}
    for node in graph.nodes.values():
        path = node.path(node.stage.conversations) if node.stage.conversations else None
        if path is not None and graph.producer_name(path) is None and (path.exists() or _is_in_cache(path)):
            stage = request_of(node, graph)
            requests.setdefault(_data_of(stage), stage)
    if not requests:
        return SampledData()
    request = SamplingRequest(tuple(requests.values()))
    return _answer(environments, "annotation", "contracts.conversation_samples", request, SampledData, [])


def _is_in_cache(source: Path) -> bool:
    """Whether a data set on the Hub may be in the local cache, so that it is worth reading."""
    if not str(source).startswith(HUB):
        return False
    name = hub_parts(str(source))[0]
    if Path(name).is_dir():
        return True
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", cache / "datasets"))
    return (prepared / name.replace("/", "___").lower()).is_dir() or (prepared / name.replace("/", "___")).is_dir()


def _data_of(stage: StageRequest) -> str:
    """A digest that is equal for stages that read the same rows in the same way."""
    return digest([stage.command, stage.config])


def scorers_without_answers(graph: Graph, unanswered: list[str]) -> Iterator[Finding]:
    """Find scorers that need known answers, but score prompts without any.

    Args:
        unanswered: names of stages that import such prompts, one for all that import the same rows.
    """
    without_answers = {_data_of(request_of(graph.nodes[name], graph)) for name in unanswered}
    without: dict[str, bool] = {}
    for node in graph.nodes.values():
        config = node.config
        if not isinstance(config, ScoreConfig) or not config.reads_answer or config.max_dropped >= 1:
            continue
        sets = _prompt_sets(graph.sampler(config.rollouts), graph)
        for importer in sets:
            if importer.name not in without:
                of_world = _world_file(importer, graph) is not None  # the toy task's prompts have no answers
                without[importer.name] = of_world or _data_of(request_of(importer, graph)) in without_answers
        if sets and all(without[importer.name] for importer in sets):
            names = " and ".join(_world_file(importer, graph) or str(importer.path("source")) for importer in sets)
            found = f"scorer {config.name!r}: {config.needs_answer}, which no prompt of {names} has."
            yield Finding("error", found, f"{ANSWER_FIX}, or take other prompts.")


def too_small_sets(graph: Graph, counts: dict[str, int]) -> Iterator[Finding]:
    """Find sets of prompts that are too small for the draws of an iteration.

    Args:
        counts: by stage, as far as known, the number of different prompts that it imports.
    """
    known = {_data_of(request_of(graph.nodes[name], graph)): count for name, count in counts.items()}
    taken: Counter[str] = Counter()
    reported = set()
    draws = (node.config for node in graph.nodes.values() if isinstance(node.config, DrawConfig))
    for config in itertools.islice((config for config in draws if not config.replaces), DRAWS):
        weights = {name: config.weights.get(name, 1.0) for name in config.sources}
        wanted = Counter(next_sources(weights, taken, config.count))
        taken += wanted
        for name, path in config.sources.items():
            importer = graph.producer(path)
            count = None if importer is None else _count_of(importer, graph, known)
            if count is not None and count < wanted[name] and name not in reported:
                reported.add(name)
                yield Finding("error", too_few_prompts(name, count, config.count, wanted[name]))


def _count_of(importer: Node, graph: Graph, known: dict[str, int]) -> int | None:
    """The maximum number of prompts in a set; None if unknown."""
    if (file := _world_file(importer, graph)) is None:
        return known.get(_data_of(request_of(importer, graph)))
    world = graph.nodes[graph.producer_name(importer.path("source")) or ""].config
    count = int(getattr(world, file.removeprefix("world:").partition(".")[0]))
    return min(count, importer.config.model_dump().get("limit") or count)


def _world_file(importer: Node, graph: Graph) -> str | None:
    """The file of the toy task that a stage imports; None if it imports something else."""
    path = importer.path("source")
    owner = None if path is None else graph.producer_name(path)
    if path is None or owner is None or graph.nodes[owner].config.stage != "world":
        return None
    return f"world:{path.name}"


def _prompt_sets(sampled: Node | None, graph: Graph) -> list[Node]:
    """The stages that import the prompts of a sampling stage; empty if they are not known."""
    if sampled is None or "prompts" not in type(sampled.config).model_fields:
        return []
    drawn = graph.producer(sampled.path("prompts"))
    if drawn is None or drawn.stage.command == "prompts":
        return [drawn] if drawn is not None else []
    found = [graph.producer(Path(path)) for path in drawn.config.model_dump().get("sources", {}).values()]
    return [node for node in found if node is not None and node.stage.command == "prompts"]


def _sources(graph: Graph, environment: str) -> list[Path]:
    """The user's own source files that the stages of an environment execute."""
    found: set[Path] = set()
    for node in graph.nodes.values():
        if node.environment == environment:
            with contextlib.suppress(UserError):  # reported by `input_mistakes`
                found |= {path.absolute() for path in node.config.source_files().values()}
    return sorted(found)


def _servers(graph: Graph, environment: str) -> list[str]:
    """The servers that the stages of an environment send requests to; their state cannot be part of a cache key."""
    return [
        url for node in graph.nodes.values() if node.environment == environment for url in node.config.server_urls()
    ]


def _state(path: Path) -> Any:
    """The state of a file or directory for detecting changes: names, sizes, times."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(file), file.stat()) for file in files if file.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats]


def _answer(
    environments: EnvironmentsSection,
    name: str,
    module: str,
    request: PreflightRequest | SamplingRequest,
    reply: type[R],
    sources: list[Path],
    *,
    keep: bool = True,
) -> R:
    """The reply of `python -m MODULE`, cached until one of the files changes, unless `keep` is false.

    Args:
        sources: files that it reads in addition to those named in the stages' configs.

    Raises:
        UserError: the environment cannot run it.
    """
    environment, encoded = environments.of(name), msgspec.json.encode(request)
    named = leaves([stage.config for stage in request.stages])
    files: set[Path] = {Path(value) for value in named if isinstance(value, str) and value.startswith("/")}
    packages = {"contracts", *(stage.package for stage in request.stages)}
    known = [
        module,
        encoded.decode(),
        probe_versions(environment, name),
        [source_version(package) for package in sorted(packages)],
        [_state(file) for file in sorted({*files, *sources})],
    ]
    memory = home() / "preflight" / f"{digest(known)}.json"
    if keep and memory.is_file():
        return msgspec.json.decode(memory.read_bytes(), type=reply)
    answer = ask(environment, name, ["-m", module], "run preflight", request=encoded)
    found = msgspec.json.decode(answer, type=reply)
    keep = keep and not getattr(found, "unread", ())
    if keep and not any(finding.level == "error" for finding in found.findings):
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, answer, durable=False)
    return found
