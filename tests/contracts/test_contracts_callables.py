"""Functions of the user's own: found without running them, and known by all of the user's code that they use."""

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from contracts.attempt import ATTEMPT
from contracts.callable_check import Call
from contracts.callables import as_user_mistake, load_callable, source_file, source_files
from contracts.errors import UserError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a rule that imports a module, which imports a package, which imports its sibling."""
    files = {
        "rules.py": "import words\n\ndef judge(**kw):\n    from scales.fine import grade\n    return 1\n",
        "words.py": "from contracts.errors import UserError\nimport rules\n",
        "scales/__init__.py": "",
        "scales/fine.py": "from . import coarse\nfrom .units import UNIT\ndef grade(): ...\n",
        "scales/coarse.py": "",
        "scales/units.py": "UNIT = 1\n",
        "unrelated.py": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


@pytest.mark.parametrize("path", ["rules.py:judge", "rules:judge"])
def test_all_of_the_users_own_modules_count(project: Path, path: str) -> None:
    found = {file.resolve().relative_to(project.resolve()).as_posix() for file in source_files(path).values()}
    assert found == {"rules.py", "words.py", "scales/fine.py", "scales/coarse.py", "scales/units.py"} | (
        {"scales/__init__.py"} if "scales/__init__.py" in found else set()
    )


def test_modules_beside_a_file_elsewhere_are_imported_and_count(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in the working directory come first, as they do when they are imported; libraries before both."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name, text in {
        "my_rules.py": "import my_helper\nfrom my_package.part import two\ndef judge(): return my_helper.one + two\n",
        "my_helper.py": "import json\nimport words\none = 1\n",
        "my_package/__init__.py": "base = 2\n",
        "my_package/part.py": "from my_package import base\ntwo = base\n",
        "json.py": "raise AssertionError",
        "rules.py": "",
    }.items():
        (elsewhere / name).parent.mkdir(exist_ok=True)
        (elsewhere / name).write_text(text)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.syspath_prepend(project)
    path = f"{elsewhere}/my_rules.py:judge"
    assert load_callable(path)() == 3
    found = {name: file.resolve() for name, file in source_files(path).items()}
    assert found["my_helper"] == elsewhere / "my_helper.py"
    assert found["my_package"] == elsewhere / "my_package/__init__.py"
    assert found["my_package.part"] == elsewhere / "my_package/part.py"
    assert found["words"] == project / "words.py"
    assert found["rules"] == project / "rules.py"


def test_the_projects_own_rules_are_a_single_file(project: Path) -> None:
    assert list(source_files("embedded.reviews:gold_score")) == ["function"]


def test_what_cannot_be_read_is_a_mistake_of_the_users(project: Path) -> None:
    (project / "words.py").write_text("def (")
    with pytest.raises(UserError, match=r"words.py is not valid Python"):
        source_files("rules.py:judge")
    with pytest.raises(UserError, match="has no function 'nothing'"):
        source_file("rules:nothing")
    with pytest.raises(UserError, match="no module or file"):
        source_file("nowhere:judge")


@pytest.mark.parametrize("name", ["queue:judge", "training.mine:judge"])
def test_a_module_that_is_called_like_a_librarys_is_named_by_its_file(project: Path, name: str) -> None:
    """The library's, or Ratchet's, is what a stage would import."""
    path = Path(*name.partition(":")[0].split(".")).with_suffix(".py")
    path.parent.mkdir(exist_ok=True)
    path.write_text("def judge(): ...\n")
    with pytest.raises(UserError, match="whose name a library has too") as caught:
        source_file(name)
    by_file = re.search(r"write (\S+:\w+)", str(caught.value))
    assert by_file is not None
    assert source_file(by_file[1]).resolve() == path.resolve()


@pytest.mark.parametrize("logged", [True, False])
def test_a_traceback_is_printed_where_there_is_a_log(
    logged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ATTEMPT, str(tmp_path) if logged else "")
    with (
        pytest.raises(UserError, match=r"^f failed: KeyError: 'a' \(.*, line \d+\)\.") as told,
        as_user_mistake("f failed"),
    ):
        {}["a"]
    assert ("The log has its traceback." in str(told.value)) == logged
    assert ("Traceback" in capsys.readouterr().err) == logged


def test_a_trial_whose_asker_was_killed_says_nothing() -> None:
    """Its error output is the user's terminal."""
    reader, writer = os.pipe()
    os.close(reader)
    asked = msgspec.json.encode(Call("os:getcwd", (), ()))
    code = f"import sys; sys.path[:] = {sys.path!r}; from contracts.callable_check import main; main()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], input=asked, stdout=writer, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writer)
    assert done.stderr == b""
