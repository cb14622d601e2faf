"""Trainers for adapted models: transformers' `Trainer` that keeps the columns which say where to edit."""

import functools
import inspect
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from ..errors import ReftError
from ..files.checkpoints import last_complete
from ..model import ReftModel
from ..reach import Reach
from ..reach.callbacks import EpochTeller, ReachPrinter
from ..tuner.adapted import edits_of, penalty
from ..tuner.call import LENGTHS, LOCATIONS, SUBSPACES, Surroundings, within
from ..tuner.tuner import calls_tuner, tuner_of
from .same_data import check_same_data


class DivergedError(ReftError):
    """The numbers of a training are no numbers any more."""


class ReftTrainer(Trainer):
    """`transformers.Trainer` for models with representation edits.

    A data set may have a column `intervention_locations`, `[interventions][positions]` for each row, or
    `prompt_lengths`, and `subspaces`; they reach the model, and the column `id` does not. Checkpoints are complete
    adapters, with a classifier of the base model if it is trained. A subclass may define `compute_loss` with or without
    the argument `num_items_in_batch`, which the original's did not have.

    Only what the edits can reach is computed, wherever that equals the ordinary step; see `pyreft.reach.Reach`.

    Args:
        tokenizer: what `Trainer` calls `processing_class` today; the original's name is taken, too.
        reach: false to compute whole rows in each step, or a `Reach` with settings of its own.
    """

    def __init__(
        self,
        *args: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        reach: Reach | bool = True,
        **kwargs: Any,
    ) -> None:
        if tokenizer is not None:
            kwargs.setdefault("processing_class", tokenizer)
        super().__init__(*args, **kwargs)
        self.label_names = self.args.label_names or ["labels"]  # Trainer cannot infer them for a PEFT model
        self._asked_reach: Reach | bool = reach
        self._reach_callbacks: list[TrainerCallback] = []
        self.reach: Reach | None = None
        self._serve(reach if isinstance(reach, Reach) else None)

    def _serve(self, given: Reach | None) -> None:
        """Compute the steps of the model in part, where that can be, and tell of it; anew for another model.

        Args:
            given: a `Reach` for the model.
        """
        while self._reach_callbacks:
            self.remove_callback(self._reach_callbacks.pop())
        self.reach, asked, adapted = given, self._asked_reach, tuner_of(self.model) is not None
        if given is None and asked and adapted and self._why_whole() is None:
            self.reach = asked.anew(self.model) if isinstance(asked, Reach) else Reach(self.model)
        if self.reach is not None:
            self._reach_callbacks = [EpochTeller(self.reach), ReachPrinter(self.reach.describe)]
        elif asked and adapted:
            why = f"Whole rows are computed in each step: {self._why_whole()}."
            self._reach_callbacks = [ReachPrinter(lambda: why)]
        for callback in self._reach_callbacks:
            self.add_callback(callback)

    def call_model_init(self, trial: Any = None) -> Any:
        """As `Trainer` does it; what computes steps in part then goes over to the new model."""
        model = super().call_model_init(trial)
        if hasattr(self, "_asked_reach"):  # not while the trainer is made
            self.model = model
            self._serve(None)
        return model

    def _why_whole(self) -> str | None:
        """Why the parts of the model cannot be called apart, if they cannot."""
        if self.args.n_gpu > 1 or self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            return "the model is distributed"
        if not calls_tuner(self.model):
            return "a PeftModel without a task cannot be called in parts; give task_type to the ReftConfig"
        return "it is compiled as a whole" if self.args.torch_compile else None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        loss = cls.__dict__.get("compute_loss")
        if loss is not None and "num_items_in_batch" not in inspect.signature(loss).parameters:
            setattr(cls, "compute_loss", _without_count(loss))  # noqa: B010 (a method, to the type checker)
            cls.loss_is_scaled_for_ga = False  # a mean over the batch

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: list[str] = [*self._signature_columns, LOCATIONS, LENGTHS, SUBSPACES]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer` does it; true goes on from the newest checkpoint of which nothing is cut off or damaged."""
        if resume_from_checkpoint is True and isinstance(self.model, PeftModel):
            resume_from_checkpoint = last_complete(Path(self.args.output_dir), needed=()) or True
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self._check_parameters()
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer` does it; the training then draws, for dropout, as if nothing had been evaluated."""
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return super().evaluation_loop(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As `Trainer` does it.

        Raises:
            ReftError: the loss is no finite number any more.
        """
        with self._labelled(inputs):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss).all()):
            raise self._diverged(f"the loss of step {self.state.global_step + 1} is {loss.mean().item()}")
        return loss

    def _labelled(self, inputs: dict[str, Any]) -> AbstractContextManager[Any]:
        """Tells where the prompts of a step end, also where the loss takes the labels off, as label smoothing does."""
        labels, edits = inputs.get("labels"), edits_of(self.model)
        if edits is None or not isinstance(labels, Tensor):
            return nullcontext()
        return within(Surroundings(edits, labels=labels.to(self.args.device)))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_parameters()
        super()._save_checkpoint(model, trial)

    def _load_best_model(self) -> None:
        """Load the active adapters from the best checkpoint, each from where it was saved.

        `Trainer` looks at the first of them alone, and always where the one called `default` is saved.
        """
        names = self.model.active_adapters if isinstance(self.model, PeftModel) else []
        best = Path(str(self.state.best_model_checkpoint))
        places = {name: best if name == "default" else best / name for name in names}
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if sharded or not places or not all(place.is_dir() for place in places.values()):
            return super()._load_best_model()
        for name, place in places.items():
            self.model.load_adapter(str(place), name)
        return None

    def _check_parameters(self) -> None:
        """Refuse to go on with, or to keep, an adapter of numbers that are none.

        Raises:
            ReftError: naming the step and the first of its parameters.
        """
        for name, parameter in self.model.named_parameters():
            own: Any = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # where it is sharded
            if parameter.requires_grad and not parameter.is_meta and not bool(torch.isfinite(own).all()):
                raise self._diverged(f"after step {self.state.global_step}, {name} has numbers that are not finite")

    def _diverged(self, what: str) -> DivergedError:
        last = last_complete(Path(self.args.output_dir), needed=())
        kept = f"The last good checkpoint is {last}." if last else "There is no checkpoint yet."
        return DivergedError(
            f"The training diverges: {what}. Nothing of it is saved. {kept} Try a smaller `lr` (now "
            f"{self.args.learning_rate:g}), some steps of warm-up, or float32.",
            also=["lr"],
        )

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer` makes it.

        Raises:
            ReftError: several processes have different data, or each would train alone.
        """
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if launched > 1 and self.accelerator.distributed_type == DistributedType.NO:
            raise ReftError(
                f"{launched} processes were launched, and each would train alone. On CPUs, "
                "TrainingArguments(use_cpu=True) lets them train together."
            )
        if self.args.world_size > 1:
            check_same_data("train_dataset", self.train_dataset)
            check_same_data("eval_dataset", self.eval_dataset)
        return super().get_train_dataloader()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss and, in training, what the interventions ask for on top."""
        with nullcontext() if return_outputs or self.reach is None else self.reach.serving(losses=True):
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        extra = penalty(self.model) if model.training else None
        if extra is not None:
            # where the loss is a sum over the accumulated batches' tokens, Trainer does not divide by their number
            summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            loss = loss + extra.to(loss.device) / (self.current_gradient_accumulation_steps if summed else 1)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Where only the loss is asked for, and it is the model's, only what the edits can reach is computed."""
        partly = prediction_loss_only and type(self).compute_loss is ReftTrainer.compute_loss
        served = self.reach.serving(losses=True) if partly and self.reach is not None else nullcontext()
        with self._labelled(inputs), served:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = {name: value for name, value in super()._prepare_inputs(inputs).items() if name != "id"}
        if LOCATIONS in inputs and edits_of(self.model) is None:
            raise ReftError(
                f"locations came for a {type(self.model).__name__} without edits, which would leave them out. Train "
                "what get_reft_model(model, config) returns.",
                setting=LOCATIONS,
            )
        if LOCATIONS not in inputs and isinstance(self.model, ReftModel) and None in self.model.position_rules:
            inputs[LOCATIONS] = "all"  # as in the original, where neither the config nor the data say which tokens
        return inputs


class _UnreachedWarner(TrainerCallback):
    """Warns once of edits on which the loss of the first step does not depend: no gradient comes to what they return.

    Those of their parameters may be zero for another reason, such as a gate that is closed.
    """

    def __init__(self, model: ReftModel) -> None:
        self.model = model
        self.reached: set[int] = set()
        self.handles: list[Any] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        edits = self.model.interventions.values()
        self.handles = [edit.register_forward_hook(functools.partial(self._watch, n)) for n, edit in enumerate(edits)]

    def _watch(self, number: int, module: nn.Module, args: Any, edited: Tensor) -> None:
        if edited.requires_grad:
            edited.register_hook(lambda gradient: self.reached.add(number) if bool(gradient.any()) else None)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.handles:
            return
        while self.handles:
            self.handles.pop().remove()
        config = self.model.peft_config[self.model.active_adapter]
        places = config.expand(config.base_model_shape["num_hidden_layers"])
        unreached = [place for number, place in enumerate(places) if number not in self.reached]
        if unreached and state.is_world_process_zero:
            layers, rules = (dict.fromkeys(str(getattr(p, name)) for p in unreached) for name in ("layer", "positions"))
            warnings.warn(
                f"{len(unreached)} of {len(places)} edits got no gradient from the first step (layer "
                f"{', '.join(layers)}, positions {', '.join(rules)}): the head reads a token that they do not reach. "
                "Take a rule that includes this token, such as 'f1+l16' where it is the first, as of BERT, or 'l16' "
                "where it is the last.",
                stacklevel=2,
            )


def _without_count(loss: Any) -> Any:
    @functools.wraps(loss)
    def compute_loss(self: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        return loss(self, *args, **kwargs)

    return compute_loss


class ReftTrainerForCausalLM(ReftTrainer):
    """The trainer for language models, under the original's name."""


class ReftTrainerForCausalLMDistributed(ReftTrainerForCausalLM):
    """The trainer for language models on several devices, under the original's name: `Trainer` does it."""


class ReftTrainerForSequenceClassification(ReftTrainer):
    """The trainer for classifiers: one label, several labels, or a number, as the model's `problem_type` says.

    To train the classifier beside the edits, set `requires_grad` of its parameters, or name it in
    `ReftConfig(modules_to_save=[...])`. Edits that the loss cannot depend on are told once, after the first backward:
    those of the last layer, where no position rule takes them to the token that the classifier reads.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.model, ReftModel) and self._why_whole() is None and self.model_init is None:
            self.add_callback(_UnreachedWarner(self.model))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs, config = super()._prepare_inputs(inputs), self.model.config
        numbers = config.problem_type in ("regression", "multi_label_classification")
        if "labels" in inputs and (numbers or (config.problem_type is None and config.num_labels == 1)):
            inputs["labels"] = inputs["labels"].to(self.model.dtype)
        return inputs
