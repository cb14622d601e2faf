"""What tells a `Reach` how a training goes, and the user what it does."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from .step import Reach


class EpochTeller(TrainerCallback):
    """Tells the passes over the data to the store."""

    def __init__(self, reach: Reach) -> None:
        self.reach = reach

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.reach.new_epoch()


class ReachPrinter(TrainerCallback):
    """Prints once, after the first epoch, what is skipped and held, as `PrinterCallback` prints the losses."""

    def __init__(self, describe: Callable[[], str]) -> None:
        self.describe = describe
        self.told = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and not self.told:
            self.told = True
            print(self.describe())


class ReachCallback(EpochTeller):
    """Lets a trainer of transformers or TRL compute only what the edits can reach, while it trains:

        trainer.add_callback(ReachCallback(trainer.model))

    TRL's trainers for supervised training, DPO, KTO and GRPO ask for values of the labels alone, and are served in
    evaluations during the training, too. A loss of one's own that takes logits cannot be served. `ReftTrainer` needs
    no callback.

    Args:
        model, memory, directory: see `Reach`.

    Attributes:
        reach: the `Reach` at work.
    """

    def __init__(
        self, model: Any, *, memory: int | str | None = None, directory: str | os.PathLike | None = None
    ) -> None:
        super().__init__(Reach(model, memory=memory, directory=directory))
        self._serving = ExitStack()
        self._printer = ReachPrinter(self.reach.describe)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._serving.close()  # of a training that was interrupted
        self._serving.enter_context(self.reach.serving())

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self._printer.on_epoch_end(*args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._serving.close()
