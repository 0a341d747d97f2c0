"""Checks that the repos of the section `hub` can be pushed to: the token may write there, and no one else uses them."""

from collections.abc import Iterator

from huggingface_hub import HfApi, get_token

from contracts.preflight import Finding
from pipelines.config.sections import HubSection
from pipelines.hub.failures import PushError, with_retries
from pipelines.hub.remote import Remote
from pipelines.hub.uploads import Kind

LOGIN = "Set HF_TOKEN to one that may write, or `hf auth login`."


def check_access(section: HubSection) -> Iterator[Finding]:
    """Findings about everything that would keep a run from being pushed. Nothing is changed on the Hub."""
    if get_token() is None:
        yield Finding("error", "no token for the Hugging Face Hub was found, which the section hub needs", LOGIN)
        return
    try:
        account = with_retries(lambda: HfApi().whoami(), "huggingface.co", patience=lambda: 5.0)
    except PushError as error:
        if error.failure.lasts:
            yield Finding("error", str(error), LOGIN)
        else:
            fix = "The run goes on without the Hub, and `pipeline push` pushes later."
            yield Finding("warning", str(error), fix)
        return
    role = account.get("auth", {}).get("accessToken", {}).get("role", "")
    if role == "read":
        yield Finding("error", f"the token of {account['name']} on the Hugging Face Hub may only read", LOGIN)
        return
    spaces = {account["name"], *(org["name"] for org in account.get("orgs", []))}
    for repo, kind in repos(section):
        yield _check_repo(repo, kind, spaces, account["name"])


def repos(section: HubSection) -> Iterator[tuple[str, Kind]]:
    """The repos of a section, each with its kind."""
    if section.model:
        yield section.model, "model"
    for repo in (section.pairs, section.rollouts):
        if repo:
            yield repo, "dataset"


def _check_repo(repo: str, kind: Kind, spaces: set[str], name: str) -> Finding:
    remote, space = Remote(repo, kind), repo.partition("/")[0]

    def ask() -> str:
        head = remote.head()
        if head is None:
            return "will be created"
        HfApi().auth_check(repo, repo_type=kind, write=True)
        remote.require_own_repo(head)
        return "exists, and the token may write there"

    if space not in spaces:
        fix = f"Name it {name}/{repo.partition('/')[2]}, or use the token of a member of {space}."
        return Finding("error", f"the section hub pushes to {repo}, but {name} is not a member of {space}", fix)
    try:
        return Finding("ok", f"{repo} {with_retries(ask, repo, patience=lambda: 5.0)}")
    except PushError as error:
        return Finding("error" if error.failure.lasts else "warning", str(error))
