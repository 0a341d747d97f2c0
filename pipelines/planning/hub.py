"""Resolves models and data sets on the Hub, hf:ORG/NAME[@REVISION], to local directories and commits.

A run records the commits that it was made with, so that a branch or tag that moves later does not change it. Models are
downloaded once and then used like any other directory; data sets are read, at their commit, by the stage that imports
them.

huggingface_hub is imported only if something is on the Hub: importing it takes longer than the rest of the command.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from contracts.config import Role
from contracts.errors import UserError
from contracts.sources import HUB, hub_parts
from pipelines.config.run import RunConfig

MODEL_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
COMMIT = re.compile("[0-9a-f]{40}")
Kind = Literal["model", "dataset"]
Commits = dict[str, str]
"""The resolved commits, by kind and reference ("model hf:ORG/NAME@REVISION")."""


class HubResolver:
    """Resolves the Hub references of one run."""

    def __init__(self, commits: Commits | None, *, download: bool) -> None:
        """Use and extend a run's record of commits.

        Args:
            commits: the record; None for a run of a version that kept none, whose data sets are then not resolved.
            download: whether to query the Hub and download models; otherwise only the local cache is read.
        """
        self.commits = commits
        self.download = download

    def resolve(self, config: RunConfig) -> RunConfig:
        """Replace every model in the config by its directory, and every data set's name by one with its commit.

        Raises:
            UserError: something does not exist on the Hub, or is not accessible.
        """
        return _with_data(_with_models(config, self.model), self.data)

    def model(self, reference: str) -> str:
        """The directory of a model on the Hub; the reference itself if it is not on the Hub, or not in the cache."""
        if not reference.startswith(HUB):
            return reference
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        name, revision = name_and_revision(reference)
        wanted = (self.commits or {}).get(f"model {reference}") or revision
        with _explained("model", reference, name, revision):
            try:
                directory = snapshot_download(
                    name, revision=wanted, allow_patterns=MODEL_PATTERNS, local_files_only=not self.download
                )
            except LocalEntryNotFoundError:
                if self.download:
                    raise
                return reference
        if not list(Path(directory).glob("*.safetensors")):
            if not self.download:
                return reference
            raise UserError(f"model {reference} has no file *.safetensors on the Hub. Name one that has.")
        self._keep("model", reference, Path(directory).name)
        return directory

    def data(self, source: str) -> str:
        """A data set on the Hub named with its commit, if that can be resolved; other sources unchanged."""
        name, part, revision = hub_parts(source)
        if not source.startswith(HUB) or self.commits is None or name.startswith(("/", ".")):
            return source
        commit = self.commits.get(f"dataset {source}") or self._commit_of(source, name, revision)
        if commit is None:
            return source
        self._keep("dataset", source, commit)
        return f"{HUB}{name}{f':{part}' if part else ''}@{commit}"

    def _commit_of(self, source: str, name: str, revision: str | None) -> str | None:
        if revision is not None and COMMIT.fullmatch(revision):
            return revision
        from huggingface_hub import HfApi, constants

        if self.download and not constants.HF_HUB_OFFLINE:
            with _explained("dataset", source, name, revision):
                return HfApi().dataset_info(name, revision=revision).sha
        refs = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs" / (revision or "main")
        return refs.read_text().strip() if refs.is_file() else None

    def _keep(self, kind: Kind, reference: str, commit: str) -> None:
        if self.commits is not None and COMMIT.fullmatch(commit):
            self.commits[f"{kind} {reference}"] = commit


def name_and_revision(reference: str | Path) -> tuple[str, str | None]:
    """The name and revision in hf:ORG/NAME[@REVISION]."""
    name, _, revision = str(reference).removeprefix(HUB).partition("@")
    return name, revision or None


def _resolved_paths(paths: Any, resolve: Callable[[str], str]) -> Any:
    """Apply `resolve` to a path, or to each path of a list."""
    return [_resolved_paths(path, resolve) for path in paths] if isinstance(paths, list) else Path(resolve(paths))


def _with_models(config: RunConfig, resolve: Callable[[str], str]) -> RunConfig:
    """Apply `resolve` to every model in the config."""
    scorers = {}
    for name, scorer in config.scorers.items():
        named = {field: value for field, value in scorer.select(Role.INPUT).items() if value is not None}
        scorers[name] = scorer.model_copy(
            update={field: _resolved_paths(value, resolve) for field, value in named.items()}
        )
    changes: dict[str, Any] = {"policy": resolve(config.policy), "scorers": scorers}
    if inputs := config.training.inputs:
        resolved = [Path(resolve(str(path))) for path in inputs]
        changes["training"] = config.training.model_copy(update={"inputs": resolved})
    critic = config.critic
    if critic is not None and critic.start:  # otherwise the key must stay unset
        changes["critic"] = critic.model_copy(update={"start": resolve(critic.start)})
    if config.changes:  # of the keys that can change, only models can be on the Hub
        changes["changes"] = {start: _resolved(change, resolve) for start, change in config.changes.items()}
    return config.model_copy(update=changes)


def _resolved(value: Any, resolve: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _resolved(inner, resolve) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, resolve) for inner in value]
    return resolve(value) if isinstance(value, str) else value


def _with_data(config: RunConfig, resolve: Callable[[str], str]) -> RunConfig:
    """Apply `resolve` to every data set in the config."""

    def resolved(section: Any, key: str) -> Any:
        source = getattr(section, key)
        found = type(source)(resolve(str(source)))
        return section if found == source else section.model_copy(update={key: found})

    prompts = config.prompts
    update = {"heldout": resolved(prompts.heldout, "source")}
    if prompts.train is not None:
        update["train"] = resolved(prompts.train, "source")
    if prompts.mixture is not None:
        update["mixture"] = {name: resolved(section, "source") for name, section in prompts.mixture.items()}
    changes: dict[str, Any] = {}
    if any(value != getattr(prompts, key) for key, value in update.items()):
        changes["prompts"] = prompts.model_copy(update=update)
    if config.sft is not None:
        changes["sft"] = resolved(config.sft, "demonstrations")
    if config.offline is not None:
        changes["offline"] = resolved(config.offline, "source")
    if (section := config.reward_model) is not None:
        changes["reward_model"] = section.model_copy(update={"prompts": resolved(section.prompts, "source")})
    return config.model_copy(update=changes)


@contextlib.contextmanager
def _explained(kind: Kind, reference: str, name: str, revision: str | None) -> Iterator[None]:
    """Turn errors of huggingface_hub into one message with the fix."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{'model' if kind == 'model' else 'data set'} {reference}"
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{reference} is not a valid name of a {kind} on the Hub: {error}") from error
    except GatedRepoError as error:
        raise UserError(
            f"{what} is gated: ask for access on its page on the Hub, then set HF_TOKEN, or `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{what} is not on the Hub, or the token may not see it. Check the name; for a private one set HF_TOKEN or "
            "`hf auth login`; or give a local directory."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{what}: {name} has no revision {revision!r}; {_revisions(kind, name)}.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"{what} is not in the local cache, and the Hub is out of reach: no network, or HF_HUB_OFFLINE is set. "
            f"Run `hf download {name}` where there is a network, or give a local directory."
        ) from error
    except HfHubHTTPError as error:
        raise UserError(
            f"{what} could not be downloaded: {str(error).splitlines()[0]} Check the name, the network and HF_TOKEN; "
            "or give a local directory."
        ) from error
    except OSError as error:
        if error.errno is not None:
            raise  # an error of the local disk
        raise UserError(f"{what} could not be downloaded: {str(error).splitlines()[0]}") from error


def _revisions(kind: Kind, name: str) -> str:
    """The revisions of a repo, for a message."""
    from huggingface_hub import HfApi

    refs = HfApi().list_repo_refs(name, repo_type=kind)
    found = [ref.name for ref in (*refs.tags, *refs.branches)]
    return f"it has {', '.join(found[:12])}{', ...' if len(found) > 12 else ''}"
