"""How a process of ours ends, for scripts and launchers."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit statuses; the numbers follow sysexits.h where it has one."""

    OK = 0
    #: An unforeseen error; the log has its traceback.
    ERROR = 1
    #: A flag, a setting or a given file is wrong.
    USAGE = 2
    #: The model can't be served as asked.
    MODEL = 65
    #: Processes could not be started or joined, or an address could not be had.
    LAUNCH = 69
    #: Another shard or the coordinator is gone; started again, this process can serve again.
    REPLICA_LOST = 75
    #: A second signal ended the drain, or SIGINT a shard.
    INTERRUPTED = 130
