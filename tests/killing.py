"""Kill a real process right before each change it makes to the disk."""

import os
import signal
import sys
import traceback

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def kills(function):
    """Run a function in child processes, each killed (SIGKILL) one change later than the one before; yields after each.

    Changes are the audit events of Python that rename, remove or make a file or a directory, or open one to write. The
    last child ends by itself.
    """
    number = 0
    while True:
        number += 1
        child = os.fork()
        if child == 0:
            _run(function, number)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield number


def _run(function, number):
    left = number

    def hook(event, args):
        nonlocal left
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in _CHANGES or writes:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(hook)
        function()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
