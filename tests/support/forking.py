"""Forked children of the warm test process, as importing torch anew for each run would cost more than the test; and free ports."""

import os
import socket
import sys
import traceback

import torch


def fork(function, *arguments):
    """Start `function` in a child forked from this warm process and return its process id.

    The child keeps to one core: it inherits an OpenMP pool without its threads when an earlier test computed on several, and
    would wait for them forever if the code under test asked for more than one again (`use_cores` counts the cores it may use).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        function(*arguments)
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:  # noqa: BLE001  the child must never return into pytest
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def exit_codes(children):
    """Wait for forked children and return their exit codes, or minus the signal that ended one."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def free_port():
    """Return a port of this machine that no process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
