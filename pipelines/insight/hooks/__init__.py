"""Hooks: functions of the user's own that are called when something happens in a run, each in a process of its own.

    configured.py   those of a run's config, and what is wrong with their functions
    task.py         what a process is told, and what it has on the disk
    happenings.py   the events and points of a run, as a function is told them
    __main__.py     the process

pipelines/insight/listeners/hooks.py starts and ends the processes.
"""
