"""Passes pip's configuration of package indexes on to uv, which does not read it."""

import ast
import subprocess
import sys
from collections.abc import Mapping

INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS")


def pip_settings() -> dict[str, str]:
    """The settings (files and PIP_* variables) that `pip install` uses here, by option name."""
    command = [sys.executable, "-m", "pip", "config", "list", "--disable-pip-version-check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    # In an environment without pip, such as one made by uv, there is no pip configuration to follow.
    return parse_settings(result.stdout) if result.returncode == 0 else {}


def parse_settings(listing: str) -> dict[str, str]:
    """Parse the output of `pip config list`; the section `install` overrides `global`, and PIP_* variables both."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        name, separator, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if separator and section in sections:
            sections[section][option] = str(ast.literal_eval(value))
    return sections["global"] | sections["install"] | sections[":env:"]


def uv_variables(pip: Mapping[str, str], environ: Mapping[str, str], variant: str) -> dict[str, str]:
    """Variables that make uv use pip's indexes and network settings. Variables already in `environ` are left out.

    If no index is configured at all, the CPU build of torch comes from PyTorch's own index, which uv knows: the public
    index only has the build that needs CUDA's libraries.
    """
    found = {"UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1"}
    # As pip does: the best version of all indexes, not the first index that has the name.
    found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if not any(name in environ for name in INDEX_VARIABLES):
        if "index-url" in pip:
            found["UV_DEFAULT_INDEX"] = pip["index-url"]
        if "extra-index-url" in pip:
            found["UV_INDEX"] = " ".join(pip["extra-index-url"].split())
        if "find-links" in pip:
            found["UV_FIND_LINKS"] = ",".join(pip["find-links"].split())
        if variant == "cpu" and not any(name in found for name in INDEX_VARIABLES) and not uv_options(pip):
            found["UV_TORCH_BACKEND"] = "cpu"
    if "trusted-host" in pip:
        found["UV_INSECURE_HOST"] = " ".join(pip["trusted-host"].split())
    if certificate := pip.get("cert") or environ.get("REQUESTS_CA_BUNDLE"):
        found["SSL_CERT_FILE"] = certificate
    else:
        found["UV_SYSTEM_CERTS"] = "1"
    if "client-cert" in pip:
        found["SSL_CLIENT_CERT"] = pip["client-cert"]
    if "proxy" in pip:
        found["HTTP_PROXY"] = found["HTTPS_PROXY"] = pip["proxy"]
    if "timeout" in pip or "default-timeout" in pip:
        found["UV_HTTP_TIMEOUT"] = pip.get("timeout", pip.get("default-timeout", ""))
    return {name: value for name, value in found.items() if name not in environ}


def uv_options(pip: Mapping[str, str]) -> list[str]:
    """Command-line options of uv for pip's settings that have no environment variable."""
    return ["--no-index"] if pip.get("no-index", "").lower() in ("1", "true", "yes", "on") else []
