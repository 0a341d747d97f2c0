"""Runs `python -m MODULE` or `python -c PROGRAM` in a fork, with a file as its standard input; see warm_asking.py.

python -m asked FILE -m MODULE
"""

import os
import runpy
import sys

if __name__ == "__main__":
    file, flag, what = sys.argv[1:]
    os.dup2(os.open(file, os.O_RDONLY), 0)
    sys.argv = [flag]
    if flag == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})
