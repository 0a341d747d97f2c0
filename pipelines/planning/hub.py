"""Models and data sets named by a Hub id, hf:ORG/NAME[@REVISION]: what the name stands for, and where that is.

A run keeps the commits that it was made with: a tag or a branch that moves later changes nothing in it. Models are
downloaded once, then a directory like any other; data sets are read by the stage that imports them, at their commit.

The Hub's library is loaded where something is on the Hub: it takes longer to load than all of this command.
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
"""By kind and name ("model hf:ORG/NAME@REVISION"), the commit that it stands for."""


class OnHub:
    """What the names of things on the Hub stand for, in one run."""

    def __init__(self, commits: Commits | None, *, download: bool) -> None:
        """Without a record of commits (of runs from before there was one), data sets stay as they are named.

        Args:
            commits: what the run was made with.
            download: ask the Hub, and get the models; else only the local cache is looked at.
        """
        self.commits = commits
        self.download = download

    def locate(self, config: RunConfig) -> RunConfig:
        """The same configuration with every model at its directory, and every data set at its commit.

        Raises:
            UserError: the Hub does not have it, or does not show it.
        """
        return _with_data(_with_models(config, self.model), self.data)

    def model(self, reference: str) -> str:
        """The directory of a model on the Hub; of others, and of one that is not there, what it was."""
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
        """A data set on the Hub, named by its commit, where that can be found out; others as they are."""
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
    """What hf:ORG/NAME[@REVISION] names."""
    name, _, revision = str(reference).removeprefix(HUB).partition("@")
    return name, revision or None


def _at(paths: Any, place: Callable[[str], str]) -> Any:
    """A path, or a list of some, where `place` says."""
    return [_at(path, place) for path in paths] if isinstance(paths, list) else Path(place(paths))


def _with_models(config: RunConfig, place: Callable[[str], str]) -> RunConfig:
    """The same configuration with every model where `place` says."""
    scorers = {}
    for name, scorer in config.scorers.items():
        named = {field: value for field, value in scorer.select(Role.INPUT).items() if value is not None}
        scorers[name] = scorer.model_copy(update={field: _at(value, place) for field, value in named.items()})
    changes: dict[str, Any] = {"policy": place(config.policy), "scorers": scorers}
    if inputs := config.training.inputs:
        placed = [Path(place(str(path))) for path in inputs]
        changes["training"] = config.training.model_copy(update={"inputs": placed})
    critic = config.critic
    if critic is not None and critic.start:  # else it stays a key that the user has not set
        changes["critic"] = critic.model_copy(update={"start": place(critic.start)})
    if config.changes:  # of what can change, only models are on the Hub
        changes["changes"] = {start: _placed(change, place) for start, change in config.changes.items()}
    return config.model_copy(update=changes)


def _placed(value: Any, place: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _placed(inner, place) for key, inner in value.items()}
    if isinstance(value, list):
        return [_placed(inner, place) for inner in value]
    return place(value) if isinstance(value, str) else value


def _with_data(config: RunConfig, place: Callable[[str], str]) -> RunConfig:
    """The same configuration with every data set named as `place` says."""

    def placed(section: Any, key: str) -> Any:
        source = getattr(section, key)
        found = type(source)(place(str(source)))
        return section if found == source else section.model_copy(update={key: found})

    prompts = config.prompts
    update = {"heldout": placed(prompts.heldout, "source")}
    if prompts.train is not None:
        update["train"] = placed(prompts.train, "source")
    if prompts.mixture is not None:
        update["mixture"] = {name: placed(section, "source") for name, section in prompts.mixture.items()}
    changes: dict[str, Any] = {}
    if any(value != getattr(prompts, key) for key, value in update.items()):
        changes["prompts"] = prompts.model_copy(update=update)
    if config.sft is not None:
        changes["sft"] = placed(config.sft, "demonstrations")
    if config.offline is not None:
        changes["offline"] = placed(config.offline, "source")
    if (section := config.reward_model) is not None:
        changes["reward_model"] = section.model_copy(update={"prompts": placed(section.prompts, "source")})
    return config.model_copy(update=changes)


@contextlib.contextmanager
def _explained(kind: Kind, reference: str, name: str, revision: str | None) -> Iterator[None]:
    """What the Hub's library raises, as one message with the fix."""
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
        raise UserError(f"{reference} is no name of a {kind} on the Hub: {error}") from error
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
            raise  # of the disk here
        raise UserError(f"{what} could not be downloaded: {str(error).splitlines()[0]}") from error


def _revisions(kind: Kind, name: str) -> str:
    """What revisions there are, in words."""
    from huggingface_hub import HfApi

    refs = HfApi().list_repo_refs(name, repo_type=kind)
    found = [ref.name for ref in (*refs.tags, *refs.branches)]
    return f"it has {', '.join(found[:12])}{', ...' if len(found) > 12 else ''}"
