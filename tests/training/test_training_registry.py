"""Algorithms are read without running them, and every mistake in one is a message that names it."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from contracts.errors import UserError
from training.registry import BUILT_IN, FOLDER, check_settings, describe, load
from training.settings import Setting

ROOT = Path(__file__).parents[2]
GOOD = """\
READS = "pairs"
NEEDS = ("reference",)

def loss(batch, *, beta: float = 0.1, kind: Literal["a", "b"] = "a", steps: int = 3, limit: float | None = None):
    return {}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def write(text: str, name: str = "mine.py") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(dedent(text))
    return name


def test_the_built_in_algorithms() -> None:
    assert set(BUILT_IN) == {file.stem for file in FOLDER.glob("*.py")} - {"__init__", "parts"}
    for name in BUILT_IN:
        description = describe(name)
        module = load(name)
        assert (description.reads, description.needs) == (module.READS, module.NEEDS)
        assert description.sources == {"algorithm": FOLDER / f"{name}.py"}
        assert description.state == getattr(module, "STATE", {})
        for function, settings in description.functions.items():
            defaults = {setting: description.defaults[setting] for setting in settings}
            assert defaults == (getattr(module, function).__kwdefaults__ or {})
        assert {name for name in ("loss", "advantages", "statistics", "update") if hasattr(module, name)} == set(
            description.functions
        )


def test_which_algorithms_learn_from_the_answers_of_older_policies() -> None:
    found = {name: describe(name) for name in BUILT_IN}
    assert {name for name, it in found.items() if it.off_policy} == {
        "decoupled_ppo", *(name for name, it in found.items() if it.reads == "pairs")
    }  # fmt: skip
    levels = {name: it.corrections for name, it in found.items() if it.reads == "samples"}
    every = ("token", "sequence", "geometric")
    assert levels == {
        "ppo": every, "process_ppo": every, "grpo": every, "dr_grpo": every, "cispo": every, "reinforce_pp": every,
        "remax": every, "rloo": ("sequence", "geometric"), "raft": (), "decoupled_ppo": (),
    }  # fmt: skip
    mine = describe(write(f"{HEAD.replace('pairs', 'samples')}{LOSS}def advantages(experience): ...\n"))
    assert (mine.off_policy, mine.corrections) == (False, every)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_numeric_setting_of_a_built_in_algorithm_has_limits(name: str) -> None:
    description = describe(name)
    for setting, found in description.settings.items():
        if {"int", "float"} & set(found.type.split()):
            assert found.limits, setting
            with pytest.raises(UserError, match=f"'{setting}' is -1, but must be"):
                check_settings(description, {setting: -1})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dpo", {"beta": 0}, r"algorithm 'dpo': the setting 'beta' is 0, but must be > 0 \(its default is 0.1\)"),
        ("dpo", {"label_smoothing": 0.5}, "'label_smoothing' is 0.5, but must be >= 0, < 0.5"),
        ("ipo", {"beta": 0.0}, "'beta' is 0.0, but must be > 0"),
        ("exo", {"label_smoothing": 0.0}, "must be > 0, < 0.5"),
        ("ppo", {"gamma": 1.01}, "'gamma' is 1.01, but must be >= 0, <= 1"),
        ("ppo", {"clip": -0.2}, "must be > 0, <= 1"),
        ("decoupled_ppo", {"gamma": 2}, "'gamma' is 2, but must be >= 0, <= 1"),  # that of the advantages it imports
        ("dr_grpo", {"max_tokens": 0}, "'max_tokens' is 0, but must be >= 1"),
        ("grpo", {"clip_high": 0}, "'clip_high' is 0, but must be > 0"),
        ("wpo", {"cap": -1.0}, "'cap' is -1.0, but must be >= 0"),
    ],
)
def test_settings_that_make_no_sense(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(describe(name), settings)


def test_what_is_read_of_one() -> None:
    description = describe("ppo")
    assert (description.reads, description.needs) == ("samples", ("reference", "values"))
    assert description.settings["gamma"] == Setting(1.0, "float", limits=">= 0, <= 1")
    assert description.settings["whiten"] == Setting(True, "bool")
    assert description.functions["advantages"] == ("gamma", "lam", "whiten")
    settings = check_settings(description, {"gamma": 0.9})
    assert description.arguments("advantages", settings) == {"gamma": 0.9, "lam": 0.95, "whiten": True}


def test_it_runs_without_torch_and_without_the_algorithm() -> None:
    write("import torch\nraise RuntimeError\n" + GOOD)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from training.registry import BUILT_IN, describe\n"
        "print(*[describe(name).algorithm for name in (*BUILT_IN, 'mine.py')])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert result.stdout.split() == [*BUILT_IN, "mine.py"], result.stderr


@pytest.mark.parametrize("name", ["mine.py", "sub/dir/mine.py", "sub.mine"])
def test_the_users_own_file(name: str) -> None:
    write("CONSTANT = 3\n", "tools.py")
    file = write("from typing import Literal\nimport tools\n" + GOOD, name if "/" in name else "sub/mine.py")
    name = file if name == "mine.py" else name
    description = describe(name)
    assert description.defaults == {"beta": 0.1, "kind": "a", "steps": 3, "limit": None}
    assert {key: path.resolve() for key, path in description.sources.items()} == {
        "algorithm": Path(file).resolve(),
        "tools": Path("tools.py").resolve(),
    }
    assert load(name).loss(None) == {}


def test_functions_that_are_imported() -> None:
    write("def advantages(experience, *, gamma: float = 0.5): ...\n", "own.py")
    text = 'READS = "samples"\nNEEDS: tuple = ()\ndef loss(batch, *, clip: float = 0.1): ...\n'
    for line, gamma in (("from training.algorithms.ppo import advantages", 1.0), ("from own import advantages", 0.5)):
        description = describe(write(f"{line}\n{text}"))
        assert description.defaults["gamma"] == gamma
    assert describe(write(f"from .own import advantages\n{text}")).defaults["gamma"] == 0.5
    assert describe(write(f"from own import advantages as a\ndef advantages(e): ...\n{text}")).functions == {
        "loss": ("clip",),
        "advantages": (),
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bta": 1}, r"'mine.py' has no setting 'bta'. Did you mean 'beta'\? Its settings: beta, kind, limit, steps"),
        ({"beta": "much"}, r"'beta' is 'much', but must be a valid number \(its default is 0.1\)"),
        ({"beta": True}, "'beta' is True, but must be a valid number"),
        ({"beta": None}, "'beta' is None, but must be a valid number"),
        ({"beta": float("nan")}, "'beta' is nan"),
        ({"beta": 10**400}, "'beta' is 10+, but must be a valid number"),
        ({"limit": float("inf")}, "'limit' is inf, but must be a finite number"),
        ({"steps": 2.5}, "'steps' is 2.5, but must be a valid integer"),
        ({"kind": "c"}, "'kind' is 'c', but must be 'a' or 'b'"),
        ({"kind": ["a"]}, r"'kind' is \['a'\]"),
    ],
)
def test_wrong_settings(given: dict[str, object], message: str) -> None:
    description = describe(write(GOOD))
    with pytest.raises(UserError, match=message):
        check_settings(description, given)


def test_right_settings() -> None:
    found = check_settings(describe(write(GOOD)), {"beta": 1, "kind": "b", "limit": 2})
    assert found == {"beta": 1.0, "kind": "b", "steps": 3, "limit": 2.0}
    assert type(found["beta"]) is float
    odd = describe(write('READS = "pairs"\nNEEDS = ()\ndef loss(b, *, n=1, x: "Mine" = None, flag=False): ...\n'))
    assert check_settings(odd, {"n": 0.5, "x": "text", "flag": True}) == {"n": 0.5, "x": "text", "flag": True}
    with pytest.raises(UserError, match="'flag' is 1, but must be a valid boolean"):
        check_settings(odd, {"flag": 1})


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ("dop", r"there is no algorithm 'dop'. Did you mean '\w*dpo\w*'\? Built in: apo_down, .*path/to/mine.py"),
        ("parts", "there is no algorithm 'parts'"),
        ("own", "no algorithm 'own'. Did you mean your file 'own.py'"),
        ("gone.py", "algorithm 'gone.py': there is no such file"),
        ("sub/dir", "there is no algorithm 'sub/dir'"),
        ("no.such.module", "no module or file 'no.such.module' was found"),
    ],
)
def test_an_unknown_algorithm(algorithm: str, message: str) -> None:
    write(GOOD, "own.py")
    with pytest.raises(UserError, match=message):
        describe(algorithm)


HEAD = 'READS = "pairs"\nNEEDS = ()\n'
LOSS = "def loss(batch): ...\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def loss(batch:\n", r"mine.py'.* is not valid Python: .*line 1"),
        (LOSS, 'READS is missing; write READS = "pairs" or READS = "samples"'),
        (f'READS = "rows"\nNEEDS = ()\n{LOSS}', "READS is 'rows'; write READS = \"pairs\""),
        (f'READS = "pa" + kind\nNEEDS = ()\n{LOSS}', r"READS is read without running the file; .* not 'pa' \+ kind"),
        (f'READS = "pairs"\n{LOSS}', r'NEEDS is missing; write NEEDS = \("reference",\), or NEEDS = \(\)'),
        (f'READS = "pairs"\nNEEDS = ("reference")\n{LOSS}', r'NEEDS is \'reference\'; .*NEEDS = \("reference",\)'),
        (f'READS = "pairs"\nNEEDS = 3\n{LOSS}', "NEEDS is 3; write NEEDS = "),
        (
            f'READS = "pairs"\nNEEDS = ("values",)\n{LOSS}',
            "NEEDS has 'values', but .* reads pairs .* reference, .*coll",
        ),
        (f'READS = "samples"\nNEEDS = ("collision",)\n{LOSS}', "NEEDS has 'collision'"),
        (HEAD, "no function 'loss'"),
        (f'READS = "samples"\nNEEDS = ()\n{LOSS}', "no function 'advantages', which an algorithm that reads samples"),
        (f"{HEAD}{LOSS}def advantages(e): ...\n", 'only an algorithm with READS = "samples"'),
        (f"{HEAD}loss = make()\n", "'loss' is read without running the file; define it by 'def loss'"),
        (f"{HEAD}class loss: ...\n", "'loss' is read without running the file"),
        (f"{HEAD}from training.algorithms.ppo import gone as loss\n", "imports no function 'gone'"),
        (f"{HEAD}from elsewhere import loss\n", r"'from elsewhere import loss' is followed .* does not exist"),
        (f"{HEAD}def loss(batch, beta=0.1): ...\n", r"must take one argument.*found \(batch, beta=0.1\)"),
        (f"{HEAD}def loss(): ...\n", "must take one argument"),
        (f"{HEAD}def loss(batch, **settings): ...\n", "must take one argument"),
        (f"{HEAD}def loss(batch, *, beta): ...\n", "the setting 'beta' has no default"),
        (f"{HEAD}def loss(batch, *, beta=B): ...\n", "default of the setting 'beta' is read without .* not B"),
        (f"{HEAD}def loss(batch, *, beta=[1]): ...\n", r"default of the setting 'beta' .* not \[1\]"),
        (
            f'{HEAD}def loss(batch, *, beta: float = "x"): ...\n',
            "'beta' is 'x', but must be a valid number",
        ),
        (
            f'{HEAD}LIMITS = {{"bta": "> 0"}}\ndef loss(b, *, beta=1): ...\n',
            "has 'bta', which is not a setting. Did .* 'beta'",
        ),
        (
            f'{HEAD}LIMITS = {{"beta": "above 0"}}\ndef loss(b, *, beta=1): ...\n',
            "LIMITS is {'beta': 'above 0'}; write LIMITS = ",
        ),
        (f'{HEAD}LIMITS = {{"beta": 0}}\ndef loss(b, *, beta=1): ...\n', "LIMITS is {'beta': 0}; write LIMITS = "),
        (
            f'{HEAD}LIMITS = {{"beta": "> 1.2.3"}}\ndef loss(b, *, beta=1): ...\n',
            "LIMITS is {'beta': '> 1.2.3'}; write LIMITS = ",
        ),
        (
            f'{HEAD}LIMITS = {{"beta": "< 1"}}\ndef loss(b, *, beta=1): ...\n',
            "default .* 'beta' is 1, but LIMITS says '< 1'",
        ),
        (f'{HEAD}LIMITS = "beta > 0"\n{LOSS}', "LIMITS is 'beta > 0'; write LIMITS = "),
        (f'{HEAD}OFF_POLICY = "yes"\n{LOSS}', "OFF_POLICY is 'yes'; write OFF_POLICY = True"),
        (f'{HEAD}CORRECTIONS = ("token",)\n{LOSS}', "CORRECTIONS is .* an importance correction is for .* samples"),
        (
            f'{HEAD}CORRECTIONS = ("word",)\n{LOSS}',
            r"CORRECTIONS is \('word',\); write CORRECTIONS = \(\"sequence\", \"geometric\"\)",
        ),
        (f"{HEAD}STATE = {{'mean': None}}\n{LOSS}", "STATE is {'mean': None}; write STATE = "),
        (f"{HEAD}STATE = {{'mean': 0}}\n{LOSS}", "STATE needs a function 'update', which is missing"),
        (
            f"{HEAD}def loss(batch, *, beta: float = 0.1): ...\ndef statistics(batch, *, beta: float = 0.2): ...\n",
            "the setting 'beta' has another default or type in the function 'statistics' than in an earlier one",
        ),
    ],
)
def test_a_mistake_in_the_users_file(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        describe(write(text))


def test_a_file_that_fails_when_it_is_loaded() -> None:
    with pytest.raises(UserError, match=r"algorithm 'mine.py' cannot be imported: ModuleNotFoundError.*no_such"):
        load(write("import no_such\n" + GOOD))
