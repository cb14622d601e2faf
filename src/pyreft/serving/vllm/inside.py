"""Edits inside of a block of vLLM: which linear layer writes a component, in which columns, and the hooks there.

An adapter's file has the module's path in transformers. vLLM's blocks have the same, but for layers that are joined to
one, as q, k and v are.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from ...errors import ReftError
from ...places.components import find_site
from ...places.lookup import Columns, Site
from ..served import Adapter
from .private import current

COMPILED = ("value_output", "attention_output")
"""What a compiled model edits inside of its blocks: the hooks must be there before it is compiled."""


class Written(NamedTuple):
    """What a linear layer writes of a component."""

    module: nn.Module
    columns: Columns | None  # of its output, side by side; none for all


class Architecture:
    """Where transformers has what a base model's linear layers write, by a model without weights.

    Args:
        vllm_config: of an engine.
    """

    _all: ClassVar[dict[str, "Architecture"]] = {}  # by the engine

    def __init__(self, vllm_config: Any) -> None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"), current(vllm_config):  # vLLM's Transformers backend changes the classes themselves
            self.model = AutoModelForCausalLM.from_config(vllm_config.model_config.hf_config)
        self._sites: dict[tuple[str, int], Site] = {}
        self._fitting: set[str] = set()  # digests

    @classmethod
    def of(cls, vllm_config: Any) -> "Architecture":
        """The one of an engine's base model."""
        key = vllm_config.instance_id
        if key not in cls._all:
            cls._all[key] = cls(vllm_config)
        return cls._all[key]

    def site(self, part: str, layer: int) -> Site:
        """Where a component is; see `served.Sites`.

        Raises:
            ReftError: it is not there, or in columns that vLLM may have elsewhere.
        """
        if (part, layer) not in self._sites:
            site = find_site(self.model, part, layer, linear=True)
            if site.columns is not None and site.columns.groups > 1:
                raise ReftError(
                    f"queries, keys and values alternate in {site.path!r}, which vLLM puts in an order of its own, so "
                    f"{part!r} cannot be served by it. Serve this adapter with --engine transformers.",
                    setting="component",
                )
            self._sites[part, layer] = site
        return self._sites[part, layer]

    def check(self, adapter: Adapter) -> None:
        """Read an adapter's weights once, for their widths, which its config does not tell.

        Raises:
            ReftError: they are not those of the model.
        """
        if adapter.digest not in self._fitting:
            adapter.edits(self.site)
            self._fitting.add(adapter.digest)


class Inside:
    """The linear layers of the blocks that this process has.

    Args:
        vllm_config: of the engine.
        blocks: by their numbers.
        joined: by the name of a joined layer, those that it stands for, see `packed_modules_mapping` of vLLM's models.
        edit: makes what a layer writes of a component of a block an edited one.
    """

    def __init__(
        self,
        vllm_config: Any,
        blocks: Mapping[int, nn.Module],
        joined: Mapping[str, list[str]],
        edit: Callable[[Written, int, str], None],
    ) -> None:
        self.vllm_config, self.blocks, self.joined, self.edit = vllm_config, blocks, joined, edit
        self._hooked: set[tuple[int, str]] = set()

    def site(self, part: str, layer: int) -> Site:
        """Where transformers has a component."""
        return Architecture.of(self.vllm_config).site(part, layer)

    def find(self, part: str, layer: int) -> Written:
        """What writes a component here.

        Raises:
            ReftError: nothing that vLLM's block has.
        """
        site, block = self.site(part, layer), self.blocks[layer]
        path = site.path.split(f".{layer}.", 1)[-1]
        if (found := _submodule(block, path)) is not None:
            return Written(found, site.columns)
        above, _, name = path.rpartition(".")
        for one, names in self.joined.items():
            whole = _submodule(block, f"{above}.{one}" if above else one)
            if name in names and whole is not None and len(sizes := getattr(whole, "output_sizes", ())) == len(names):
                start = sum(sizes[: names.index(name)])
                return Written(whole, Columns(start, start + sizes[names.index(name)]))
        raise ReftError(
            f"{part!r} is written by {path!r}, which vLLM's {type(block).__name__} does not have.", setting="component"
        )

    def hook(self, layer: int, part: str) -> None:
        """Edit a component of a block from now on; only what an adapter edits costs a hook.

        Raises:
            ReftError: see `find`.
        """
        if (layer, part) not in self._hooked:
            self.edit(self.find(part, layer), layer, part)
            self._hooked.add((layer, part))

    def hook_all(self) -> None:
        """Hook what a model may edit that is compiled now."""
        for layer in self.blocks:
            for part in COMPILED:
                with suppress(ReftError):  # told where an adapter asks for it
                    self.hook(layer, part)


def _submodule(block: nn.Module, path: str) -> nn.Module | None:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None
