"""A replica that computes with transformers: the server of `pyreft serve`."""

from ..api.app import make_app
from ..api.guard import Keys
from ..api.listening import Options, make_service
from .replica import Replica


class TransformersReplica(Replica):
    """See `Replica`.

    Args:
        options: what it is made of.

    Raises:
        ReftError: one of the options cannot work.
    """

    def __init__(self, options: Options) -> None:
        self.service = make_service(options)
        super().__init__(
            make_app(self.service, Keys(options.api_key), body=int(options.max_body * 2**20)), options.slots
        )
        self.service.engine.start()

    def read_figures(self) -> bytes:
        return self.service.gauges.text()

    def check_health(self) -> None:
        """Have Ray replace a replica that no longer answers."""
        if not self.service.engine.scheduler.alive:
            raise RuntimeError("the scheduler has ended")

    def __del__(self) -> None:
        """Ray has waited for the requests that run; the rest gets an error."""
        if (service := getattr(self, "service", None)) is not None:
            service.ending = True
            service.engine.stop()
