"""Steering vectors without training: the difference of mean states, as an adapter like any other."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .errors import ReftError
from .files.adapter import remembered
from .interventions import BiasIntervention
from .model import ReftModel, get_reft_model
from .places.components import find_site
from .positions import Positions
from .tuner.config import ReftConfig


def diff_mean(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    positive: Sequence[str],
    negative: Sequence[str],
    layer: int,
    *,
    component: str = "block_output",
    pool: str = "all",
    positions: str = "all",
    batch_size: int = 8,
    adapter_name: str = "diff_mean",
) -> ReftModel:
    """Return a model with a steering vector: h' = h + mean(h | positive) - mean(h | negative).

    (Marks and Tegmark, arXiv 2310.06824; DiffMean in AxBench, arXiv 2501.17148.) The vector is an adapter: it can be
    saved, switched, summed with others, and weighted by `set_strength`, or for one call by `strength=`, negative
    numbers included.

    Args:
        model: the base model, or a `ReftModel`, which gets another adapter.
        tokenizer: of the base model, with a padding token.
        positive, negative: texts that show what to steer to, and what away from.
        layer: where the states are taken and the vector is added.
        component: which states of the layer.
        pool: the rule for the tokens of a text whose states are averaged; special tokens never count.
        positions: the rule for the tokens that are steered.
        batch_size: how many texts are run at once.
        adapter_name: a name for the adapter.

    Raises:
        ReftError: no texts, a layer or component that the model does not have, a tokenizer without a padding token.
    """
    if isinstance(positive, str) or isinstance(negative, str) or not positive or not negative:
        raise ReftError("diff_mean: expected lists of texts, at least one positive and one negative.")
    if tokenizer.pad_token_id is None:
        raise ReftError("The tokenizer has no padding token: set tokenizer.pad_token = tokenizer.eos_token first.")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    site = find_site(base, component, layer)
    rule = Positions.parse(pool)
    means = []
    for texts in (positive, negative):
        parts = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        sums = [_sum_of_states(model, base, tokenizer, part, site, rule) for part in parts]
        means.append(torch.stack([total for total, _ in sums]).sum(0) / max(sum(count for _, count in sums), 1))
    place = {"layer": layer, "component": component, "positions": positions, "intervention": "bias"}
    config = ReftConfig(representations=place, base_model_name_or_path=remembered(getattr(base, "name_or_path", None)))
    if isinstance(model, ReftModel):
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
    else:
        model = get_reft_model(model, config, adapter_name=adapter_name)
    (intervention,) = model.interventions.values()
    assert isinstance(intervention, BiasIntervention)
    intervention.bias.data.copy_(means[0] - means[1])
    return model.eval()


@torch.no_grad()
def _sum_of_states(
    model: Any, base: nn.Module, tokenizer: Any, texts: Sequence[str], site: Any, rule: Positions
) -> tuple[Tensor, int]:
    """The sum of the chosen tokens' states, `[d]` in float32, and how many they are."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, *states: Any) -> None:
        state = states[-1]
        seen.append(state[0] if isinstance(state, tuple) else state)

    module = base.get_submodule(site.path)
    handle = module.register_forward_hook(keep) if site.side == "output" else module.register_forward_pre_hook(keep)
    asked = {"padding": True, "padding_side": "right"}  # a base that is told no positions counts from the left
    batch = tokenizer(list(texts), **asked, return_tensors="pt", return_special_tokens_mask=True)
    chosen = batch.pop("special_tokens_mask") == 0
    batch = batch.to(next(base.parameters()).device)
    try:
        with model.disable_adapter() if isinstance(model, PeftModel) else torch.no_grad():
            base(**batch)
    finally:
        handle.remove()
    chosen = rule.locate(chosen.to(seen[0].device) & batch["attention_mask"].bool(), batch["input_ids"])
    states = seen[0] if site.columns is None else site.columns.take(seen[0])
    return states[chosen].float().sum(0), int(chosen.sum())
