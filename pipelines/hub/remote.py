"""Reads and writes repos on the Hub, so that each upload is committed exactly once.

The process can be killed at any instant, and answers can be lost; every try first looks at what the repo has:

    no repo                       it is created
    files in the LFS store        the store recognises them, and they are not sent again
    the commit without its tag    it is recognised by its content, and tagged
    the commit and its tag        nothing is left to do
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_url
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import disable_progress_bars

from contracts.errors import TransientError
from pipelines.hub.cards import is_unedited
from pipelines.hub.uploads import README, REPORT_FOLDER, Kind, Upload, UploadFile

OWN_FILES = {".gitattributes", README}
"""The files of a newly created repo."""

hub_logging.get_logger("huggingface_hub").setLevel("ERROR")  # its warnings contain signed URLs
if not sys.stderr.isatty():
    disable_progress_bars()


class RefusedError(Exception):
    """The repo has content that an upload would conflict with; it is never overwritten."""


@dataclass(frozen=True)
class Head:
    """The newest commit of a repo, and its tags."""

    commit: str
    tags: dict[str, str]


class Remote:
    """A repo on the Hub."""

    def __init__(self, repo: str, kind: Kind) -> None:
        self.repo = repo
        self.kind = kind
        self._api = HfApi()
        self._place: dict[str, Any] = {"repo_id": repo, "repo_type": kind}

    def head(self) -> Head | None:
        """The repo's newest commit and tags; None where the repo does not exist."""
        try:
            refs = self._api.list_repo_refs(**self._place)
        except RepositoryNotFoundError:
            return None
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        return Head(branches["main"], {ref.name: ref.target_commit for ref in refs.tags})

    def create(self, *, private: bool) -> None:
        """Create the repo if it does not exist."""
        self._api.create_repo(self.repo, repo_type=self.kind, private=private, exist_ok=True)

    def find(self, upload: Upload, head: Head) -> tuple[str | None, bool]:
        """The commit of an upload (None: there is none yet), and whether it has its tag.

        Raises:
            RefusedError: the tag exists with other content, a later iteration is there already, or the repo is not one
                of Ratchet's.
        """
        if (tagged := head.tags.get(upload.tag)) is not None:
            if not self.holds(upload, tagged):
                raise RefusedError(
                    f"{self.repo} has a tag {upload.tag} with other content than this run's, and what is on the Hub is "
                    f"never overwritten. Name another repo, or delete that tag if nobody needs it."
                )
            return tagged, True
        ours = set(head.tags.values())
        if later := [number for number in _iterations(head) if number > upload.iteration]:
            raise RefusedError(
                f"{self.repo} has iteration-{later[0]} already, and {upload.tag} would come after it. Name another "
                "repo, or delete the later tags and commits."
            )
        for commit in self._api.list_repo_commits(**self._place, revision=head.commit):
            if commit.commit_id in ours:
                break
            if commit.title == upload.title and self.holds(upload, commit.commit_id):
                return commit.commit_id, False
        self.require_own_repo(head)
        return None, False

    def require_own_repo(self, head: Head) -> None:
        """Raise RefusedError where a repo has files but no tag of an iteration."""
        if not _iterations(head) and (others := sorted(self.tree(head.commit).keys() - OWN_FILES)):
            raise RefusedError(
                f"{self.repo} exists and has files that no run of Ratchet has pushed ({', '.join(others[:3])}"
                f"{', ...' if len(others) > 3 else ''}); it is left as it is. Name another repo, or delete that one."
            )

    def holds(self, upload: Upload, commit: str) -> bool:
        """Whether a commit has an upload's files, compared by content."""
        tree = self.tree(commit)
        return all(item.path in tree and _same(tree[item.path], item) for item in upload.content.items)

    def tree(self, commit: str) -> dict[str, RepoFile]:
        """The files of a commit by path."""
        entries = self._api.list_repo_tree(**self._place, revision=commit, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def push(self, upload: Upload, scratch: Path, *, private: bool) -> str:
        """Commit and tag an upload, as far as that is not done yet. Returns the commit."""
        head = self.head()
        if head is None:
            self.create(private=private)
            head = self.head()
            if head is None:
                raise TransientError("it was created just now, and cannot be read yet")
        commit, has_tag = self.find(upload, head)
        if commit is None:
            commit = self._commit(upload, head, scratch)
        if not has_tag:
            self._api.create_tag(**self._place, tag=upload.tag, revision=commit, exist_ok=True)
        return commit

    def _commit(self, upload: Upload, head: Head, scratch: Path) -> str:
        tree = self.tree(head.commit)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            content = upload.content
            items = [*content.items, *content.make(Path(folder))]
            if README not in tree or self._has_unedited_card(head.commit):
                items.append(UploadFile(README, content.card.encode()))
            return self._send(items, head.commit, upload.title, [path for path in content.obsolete if path in tree])

    def _has_unedited_card(self, commit: str) -> bool:
        """Whether the card was written by Ratchet and has not been edited since."""
        url = hf_hub_url(self.repo, README, repo_type=self.kind, revision=commit)
        answer = get_session().get(url, headers=build_hf_headers())
        hf_raise_for_status(answer)
        return is_unedited(answer.content.decode(errors="replace"))

    def _send(self, items: list[UploadFile], parent: str, title: str, gone: list[str]) -> str:
        operations: list[Any] = [CommitOperationDelete(path) for path in gone]
        for item in items:
            content = item.content if isinstance(item.content, bytes) else str(item.content)
            addition = CommitOperationAdd(item.path, content)
            addition.upload_info.sha256 = bytes.fromhex(item.checked_sha256())
            operations.append(addition)
        made = self._api.create_commit(
            **self._place, operations=operations, commit_message=title, parent_commit=parent, num_threads=2
        )
        return str(made.oid)

    def push_report(self, items: list[UploadFile], title: str) -> str | None:
        """Commit the report to the main branch, unless it is there. Returns the commit; None in a repo without tags."""
        head = self.head()
        if head is None or not head.tags:
            return None
        tree = self.tree(head.commit)
        if all(item.path in tree and _same(tree[item.path], item) for item in items):
            return head.commit
        ours = {item.path for item in items}
        gone = [path for path in tree if path.startswith(f"{REPORT_FOLDER}/") and path not in ours]
        return self._send(items, head.commit, title, gone)


def _iterations(head: Head) -> list[int]:
    """The iterations that have a tag, ascending."""
    numbers = [name.removeprefix("iteration-") for name in head.tags if name.startswith("iteration-")]
    return sorted(int(number) for number in numbers if number.isdecimal())


def _same(found: RepoFile, item: UploadFile) -> bool:
    if found.lfs is not None:
        return found.lfs.sha256 == (item.sha256 or item.checked_sha256())
    return found.blob_id == item.git_oid()
