"""An engine's process ends with the server that it computes for, however that ended."""

import multiprocessing
import os
import threading
from multiprocessing import connection


def end_with_parent() -> None:
    """In the process of an engine, watch its parent; in any other, nothing. A server that is killed cannot end it."""
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().name.startswith("EngineCore"):
        return
    sentinel = parent.sentinel

    def wait() -> None:
        connection.wait([sentinel])
        os._exit(1)  # its workers watch it in turn

    threading.Thread(target=wait, daemon=True, name="reft-parent").start()
