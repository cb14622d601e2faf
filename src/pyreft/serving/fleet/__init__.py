"""Many servers as one, on Ray Serve: `serve run pyreft.serving.fleet:build adapters=DIRECTORY`.

`gate` reads which model a request names and sends it on; Ray's router chooses the replica, one that holds the adapter
if there is one; `replica` is the server of `pyreft serve`, asked without a socket; `application` puts them together.
"""

from .application import build

__all__ = ["build"]
