"""Hooks: functions of the user's own that are called when something happens in a run, each in a process of its own.

    task.py         what a process is told, what it has on the disk, how its function is checked
    happenings.py   the events and points of a run, as a function is told them
    __main__.py     the process

pipelines/insight/listeners/hooks.py starts and ends the processes.
"""
