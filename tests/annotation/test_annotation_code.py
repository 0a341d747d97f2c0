"""Programs of models in the sandbox: what they may do, and what becomes of those that do something else."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from annotation.sandbox import process as sandbox
from annotation.sandbox.process import Limits, run
from annotation.scorers import score_config
from annotation.scorers.code import CodeSettings, CodeVerifier
from contracts.errors import UserError

LIMITS = Limits(5, 512 << 20, 6)
FULL = pytest.mark.skipif(sandbox.namespaces_error() is not None, reason="the kernel gives no namespaces")


def says(code: str, answer: str, **keys: Any) -> Any:
    config = score_config(output=Path("x"), rollouts=Path("y"), kind="code", **keys)
    assert isinstance(config, CodeSettings)
    return CodeVerifier(**config.keywords)(response=f"Here:\n```python\n{code}\n```\nDone.", answer=answer)


def gone(mark: str) -> bool:
    """Whether no process has `mark` in its name any more."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        names = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                names.append((folder / "comm").read_text())
            except OSError:
                continue
        if not any(mark in name for name in names):
            return True
        time.sleep(0.05)
    return False


NAMED = "import ctypes; ctypes.CDLL(None).prctl(15, b'MARK', 0, 0, 0)\n"


@FULL
def test_assertions() -> None:
    code = "import collections, subprocess\ndef add(a, b):\n    return a + b"
    assert says(code, "assert add(1, 2) == 3") == {"score": 1.0, "passed": 1.0, "ended": "ok"}
    found = says(code, '["assert add(1, 2) == 3", "assert add(1, 1) == 3, \'three\'"]')
    assert (found["score"], found["passed"]) == (0.0, 0.5)
    assert found["ended"] == "ok: test 1 failed: three"
    assert says(code, '["assert add(1, 2) == 3", "assert add(1, 1) == 3"]', partial=True)["score"] == 0.5
    assert says("def add(a, b:", "assert add(1, 2) == 3")["ended"].startswith("exit code 1: SyntaxError")


def test_other_children_of_the_process_are_left_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert run("print(1)", Limits(5, 512 << 20, 6, namespaces=False)).stdout == "1\n"
        assert other.poll() is None


@FULL
def test_inputs_and_outputs() -> None:
    answer = '{"inputs": ["1 2\\n", "3 4"], "outputs": ["3", "7\\n"]}'
    assert says("print(sum(map(int, input().split())))  ", answer)["score"] == 1.0
    assert says("print(3)", answer, partial=True) == {"score": 0.5, "passed": 0.5, "ended": "wrong output"}
    assert says("import sys; print(3); sys.exit(2)", answer)["ended"] == "exit code 2"


@pytest.mark.parametrize("answer", ["[1, 2]", "{}", '{"inputs": ["1"], "outputs": []}', "[]"])
def test_tests_of_another_form_are_refused(answer: str) -> None:
    with pytest.raises(UserError, match="holds no tests: write Python with assertions"):
        says("pass", answer, isolation="limits")


LIBRARY = """
import importlib, pkgutil, sys
skipped = {"antigravity", "this", "idlelib", "lib2to3", "turtledemo", "test"}
for package in sorted(sys.stdlib_module_names - skipped):
    try:
        places = getattr(importlib.import_module(package), "__path__", [])
    except ImportError:
        print(package)
        continue
    for _, name, _ in pkgutil.iter_modules(places):
        try:
            if "test" not in name and name != "__main__":
                importlib.import_module(f"{package}.{name}")
        except ImportError:
            print(f"{package}.{name}")
"""


@pytest.mark.parametrize("namespaces", [pytest.param(True, marks=FULL), False])
def test_the_whole_standard_library_is_there(namespaces: bool) -> None:
    """Also where only root may enter its folder, and of packages that the sandbox has imported itself."""
    lacking = subprocess.run([sys.executable, "-I", "-S", "-c", LIBRARY], capture_output=True, text=True, check=True)
    ran = run(LIBRARY, Limits(30, 1 << 30, 6, namespaces=namespaces))
    assert (ran.code, ran.stdout) == (0, lacking.stdout), ran
    ran = run("import codecs; print('é'.encode('cp1252'), 'é'.encode('idna'), codecs.encode('a', 'rot13'))", LIMITS)
    assert ran.stdout == r"b'\xe9' b'xn--9ca' n" + "\n", ran


@FULL
def test_multiprocessing_and_pickle() -> None:
    """They find what the program has defined by the name of its module."""
    code = """
import multiprocessing, pickle
def square(x): return x * x
class Point: pass
context = multiprocessing.get_context("fork")
with context.Pool(2) as pool:
    found = pool.map(square, range(4))
lock = context.Lock()
"""
    tests = '["assert found == [0, 1, 4, 9]", "assert type(pickle.loads(pickle.dumps(Point()))) is Point"]'
    assert says(code, tests) == {"score": 1.0, "passed": 1.0, "ended": "ok"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            "not python ((",
            r"the prompt's answer 'not python \(\(' holds a test that is not valid Python: SyntaxError: ",
        ),
        ('["assert f()", "assert f( == 1"]', r"has a test 1 that is not valid Python: SyntaxError: .*line 1\)"),
        ("assert f()\0", r"that is not valid Python: \w+Error: source code string cannot contain null bytes"),
    ],
)
def test_tests_that_are_no_python_are_refused(answer: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        says("def f(): return 1", answer, isolation="limits")


ENDS = {
    "an endless loop": ("while True: pass", None),
    "a sleeper": ("import time\ntime.sleep(1000)", None),
    "a fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", None),
    "a memory hog": ("x = []\nwhile True: x.append(bytearray(1 << 24))", 1),
    "a large file": ("f = open('big', 'wb')\nwhile True: f.write(b'x' * (1 << 20))", 1),
    "one that says too much": ("while True: print('x' * 1000)", None),
    "a crash": ("import os; os.kill(os.getpid(), 11)", 128 + 11),
    "a deep recursion": ("def f(): return f()\nf()", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("namespaces", [pytest.param(True, marks=FULL), False])
@pytest.mark.parametrize("what", ENDS)
def test_what_does_not_end_by_itself_is_ended(what: str, namespaces: bool) -> None:
    code, ended = ENDS[what]
    began = time.monotonic()
    ran = run(
        NAMED.replace("MARK", "ratchet-bomb") + code, Limits(3, 512 << 20, 6, namespaces=namespaces), ["assert False"]
    )
    assert (ran.code, ran.passed) == (ended, ())
    assert time.monotonic() - began < 100, "what would sleep for 1000 s"
    assert gone("ratchet-bomb")


@pytest.mark.parametrize("namespaces", [pytest.param(True, marks=FULL), False])
def test_what_a_program_leaves_behind_is_ended(namespaces: bool) -> None:
    """Also what has left its session."""
    sandbox.adopt_orphans()
    code = (
        NAMED.replace("MARK", "ratchet-orphan")
        + "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)"
    )
    ran = run(code, Limits(60, 512 << 20, 6, namespaces=namespaces))
    assert ran.code == 0
    assert ran.seconds < 50, "it is not waited for until the limit"
    assert gone("ratchet-orphan")


@FULL
def test_what_is_outside_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither files for writing, nor processes, nor the network, nor the variables of the stage."""
    monkeypatch.setenv("SECRET_OF_THE_STAGE", "hidden")
    tmp_path.chmod(0o777)
    places = [str(tmp_path / "x"), "/tmp/ratchet-written", str(Path.home() / "x")]
    code = f"""
import os, socket
for place in {places!r}:
    try:
        open(place, "w").write("x")
        print("wrote", place)
    except OSError:
        pass
try:
    os.kill({os.getpid()}, 0)
    print("reached a process")
except OSError:
    pass
for family, address in ((socket.AF_INET, ("127.0.0.1", 22)), (socket.AF_INET, ("10.0.0.1", 80))):
    try:
        socket.socket(family).connect(address)
        print("connected")
    except OSError as error:
        print(error.errno)
print("SECRET_OF_THE_STAGE" in os.environ, os.getuid() == 0)
for own in ("own", "/dev/shm/ratchet-written"):
    open(own, "w").write("x")
    print(open(own).read())
try:
    open("/dev/shm/ratchet-large", "wb").write(b"x" * (32 << 20))
except OSError:
    print("full")
"""
    ran = run(code, LIMITS)
    assert ran.stdout.split("\n") == ["101", "101", "False False", "x", "x", "full", ""], ran
    assert not [place for place in [*places, "/dev/shm/ratchet-written"] if Path(place).exists()]


@FULL
def test_what_was_given_up_cannot_be_had_again(tmp_path: Path) -> None:
    """Making files writable again, in the namespaces that it is in or in ones of its own, or mounting over them."""
    tmp_path.chmod(0o777)
    code = f"""
import ctypes, os
libc = ctypes.CDLL(None)
def undo():
    attributes = (ctypes.c_uint64 * 4)(0, 1, 0, 0)
    how = [ctypes.c_long(one) for one in (442, -100, 0, 32)]
    done = [libc.syscall(how[0], how[1], b"/", how[2], ctypes.byref(attributes), how[3])]
    done.append(libc.mount(None, b"/", None, 0x20, None))
    try:
        open({str(tmp_path / "x")!r}, "w").write("x")
        done.append("wrote")
    except OSError:
        pass
    return done
print(undo(), libc.setuid(0))
libc.unshare(0x10000000 | 0x20000)
print(undo())
"""
    ran = run(code, LIMITS)
    assert ran.stdout == "[-1, -1] -1\n[-1, -1]\n", ran
    assert not (tmp_path / "x").exists()


@FULL
def test_a_program_that_ends_before_the_tests_passes_none() -> None:
    for leave in ("import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit"):
        found = says(f"def f(): return 1\n{leave}", "assert f() == 1")
        assert found == {"score": 0.0, "passed": 0.0, "ended": "ended by itself before its tests"}
    found = says("import os\ndef f(): os._exit(0)", '["assert f", "assert f() == 1", "assert f"]', partial=True)
    assert found == {
        "score": pytest.approx(1 / 3),
        "passed": pytest.approx(1 / 3),
        "ended": "ended by itself in test 1",
    }
    forged = "import os\nfor n in range(9): os.write(3, b'0\\n')\nos._exit(0)"
    assert says(forged, "assert False")["score"] == 0.0


def test_where_there_are_no_namespaces_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("annotation.scorers.code.namespaces_error", lambda: "unshare: Operation not permitted")
    config = score_config(output=Path("x"), rollouts=Path("y"), kind="code")
    with pytest.raises(UserError, match=r"does not allow \(unshare: Operation not permitted\). Let users create them"):
        config.check()
    score_config(output=Path("x"), rollouts=Path("y"), kind="code", isolation="limits").check()
