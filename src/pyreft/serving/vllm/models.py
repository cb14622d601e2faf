"""`Reft<architecture>`: any decoder of vLLM with edits behind its blocks; a class is made when it is asked for."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ReftError
from .flags import check_engine, compiles
from .inside import Inside, Written
from .plugin import PREFIX
from .private import check_vllm, step_layout
from .state import ReftState


@torch.library.custom_op("pyreft::edit", mutates_args=("hidden", "residual"))
def _edit(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    """The edit as one operation of a compiled graph, which finds the running engine's state when it is run."""
    ReftState.running().edit(layer, hidden, residual)


@_edit.register_fake
def _(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    return None


@torch.library.custom_op("pyreft::edit_part", mutates_args=("written",))
def _edit_part(read: Tensor, written: Tensor, layer: int, part: str) -> None:
    """The same of what a linear layer wrote."""
    ReftState.running().edit_part(layer, part, read, written)


@_edit_part.register_fake
def _(read: Tensor, written: Tensor, layer: int, part: str) -> None:
    return None


class ReftMixin:
    """Hooks on the blocks of a model of vLLM, which edit the states between them."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_vllm()
        check_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._reft = ReftState.of(vllm_config)
        self._reft_plans = not vllm_config.use_v2_model_runner  # or else `ReftModelState` does
        blocks = find_blocks(self, self._reft.shape["num_hidden_layers"])
        self._reft.have([number for number, _ in blocks])
        for number, block in blocks:
            if number == 0:
                block.register_forward_pre_hook(_edit_input, with_kwargs=True)
            block.register_forward_hook(_BlockHook(number))

        joined = getattr(self, "packed_modules_mapping", {})
        self._reft.inside = Inside(vllm_config, dict(blocks), joined, hook_part)
        if compiles(vllm_config):
            self._reft.inside.hook_all()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own, after the step's tokens were found."""
        state = self._reft
        state.enter()
        if self._reft_plans:
            layout = step_layout() if state.rows else None
            if layout is None:
                state.plan_nothing()
            else:
                state.plan(*layout)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def get_model_state_cls(self) -> type:
        """What runner V2 asks for the rows of its batch."""
        from .model_state import model_state_class

        return model_state_class(super())


class _BlockHook:
    """Edits what a block returns: the states, or two parts whose sum they are."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor):
            edit(output, None, self.layer)
        else:
            residual = output[1] if len(output) == 2 else None
            edit(output[0], residual if isinstance(residual, Tensor) else None, self.layer)


def _edit_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Edit what enters the first block: its only states, since there is no residual yet."""
    given = [kwargs["hidden_states"]] if "hidden_states" in kwargs else args
    states = [value for value in given if isinstance(value, Tensor) and value.is_floating_point()]
    if not states:
        raise ReftError(f"found no states among the inputs of {type(module).__name__}.", setting="vLLM")
    edit(states[0], None, -1)


def edit(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    """Edit the states behind a block in place, in a compiled graph or not."""
    if torch.compiler.is_compiling():
        torch.ops.pyreft.edit(hidden, residual, layer)
    else:
        ReftState.running().edit(layer, hidden, residual)


def hook_part(written_by: Written, layer: int, part: str) -> None:
    """Edit from now on what a linear layer writes of a component, in place."""
    its = written_by.columns
    columns = slice(its.start, its.stop) if its else slice(None)

    def edit_written(module: nn.Module, args: tuple, output: Any) -> None:
        states = output if isinstance(output, Tensor) else output[0]  # beside which is a bias
        written = states[..., columns]
        if torch.compiler.is_compiling():
            torch.ops.pyreft.edit_part(args[0], written, layer, part)
        else:
            ReftState.running().edit_part(layer, part, args[0], written)

    written_by.module.register_forward_hook(edit_written)


def find_blocks(model: Any, count: int) -> list[tuple[int, nn.Module]]:
    """Return the decoder's blocks that this process has, each with its number.

    Raises:
        ReftError: not exactly one list is as long as the decoder.
    """
    lists: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{found}.") for found, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            lists.append((path, module))
    if len(lists) != 1:
        found = ", ".join(path for path, _ in lists) or "none"
        raise ReftError(
            f"expected one list of {count} blocks in {type(model).__name__}, found {found}; this model cannot be "
            "served with adapters.",
            setting="vLLM",
        )
    return [(n, block) for n, block in enumerate(lists[0][1]) if type(block).__name__ != "PPMissingLayer"]


def __getattr__(name: str) -> Any:
    if not name.startswith(PREFIX):
        raise AttributeError(name)
    architecture = name.removeprefix(PREFIX)
    if architecture == "TransformersForCausalLM":
        base = importlib.import_module("vllm.model_executor.models.transformers").TransformersForCausalLM
    else:
        from vllm import ModelRegistry

        if architecture not in ModelRegistry.models:
            raise AttributeError(f"vLLM has no model {architecture!r}")
        base = ModelRegistry.models[architecture].load_model_cls()
    made = type(name, (ReftMixin, base), {"__module__": __name__})
    globals()[name] = made
    return made
