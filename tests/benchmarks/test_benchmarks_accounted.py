"""Where the CPU time of a command goes, by process: also of one that its parent did not wait for."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.accounted import parts_of

BURN = "import time\nend = time.process_time() + {seconds}\nwhile time.process_time() < end: pass"
RENAMED = "import ctypes; ctypes.CDLL(None).prctl(15, b'wandb-core'); "
ORPHAN = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]])"
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from benchmarks import accounted
accounted.watch()
import subprocess
for code in sys.argv[3:]:
    subprocess.run([sys.executable, "-c", sys.argv[2], code], check=True)
print(json.dumps(accounted.record()))
"""


def test_processes_that_nobody_waited_for_are_counted_by_their_name(root: Path) -> None:
    codes = [RENAMED + "\n" + BURN.format(seconds=0.4), BURN.format(seconds=0.8)]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(root), ORPHAN, *codes], stdout=subprocess.PIPE, text=True, check=True
    )
    record = json.loads(result.stdout)
    parts = parts_of(record)
    assert list(parts.watching) == ["left by a reader: wandb-core"]
    assert 0.4 <= parts.watched < 0.8
    assert parts.all >= 0.4 + 0.8
