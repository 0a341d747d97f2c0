"""Hooks: the user's functions that are called when something happens in a run, each in its own process.

    configured.py   the hooks of a run's config, and the checks of their functions
    task.py         what a hook's process is given, and its progress on the disk
    happenings.py   turns the events and points of a run into what the functions are called with
    __main__.py     the process

pipelines/insight/listeners/hooks.py starts and ends the processes.
"""
