"""Disks that cannot take a file: small ones of their own where the user may mount some, a limit of files elsewhere."""

import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager


class Disk:
    """A file system of a few megabytes at a folder, which becomes full and has room again."""

    def __init__(self, path):
        self.path = path

    def fill(self):
        with (self.path / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                assert shutil.disk_usage(self.path).free == 0

    def protect(self):
        subprocess.run(["mount", "-o", "remount,ro", str(self.path)], check=True)

    def free(self):
        subprocess.run(["mount", "-o", "remount,rw", str(self.path)], check=True)
        (self.path / "filler").unlink(missing_ok=True)


@contextmanager
def small_disk(path):
    """Mount one for a `with` block; none where the user may not."""
    path.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(path)]
    if not sys.platform.startswith("linux") or subprocess.run(words, capture_output=True).returncode:
        yield None
        return
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


class Limit:
    """No file of this process may be larger than some kilobytes; for every user."""

    def __init__(self, path):
        self.path = path
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, self.before[1]))

    def free(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@contextmanager
def limited(path):
    """The same for a limit."""
    found = Limit(path)
    try:
        yield found
    finally:
        found.free()
