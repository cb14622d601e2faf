"""An adapter's config, weights and model card: written for strangers, and read without trust.

`adapter_config.json` and `adapter_model.safetensors` may be another method's of PEFT, and may be edited by hand.
"""

import inspect
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import ReftError, check_type, did_you_mean
from ..places.structure import PREFIX, generates
from ..tuner.config import ReftConfig, ReftPeftType
from ..tuner.injection import representations_of, site_of, take_back
from ..tuner.values import check_values
from .pickles import read_pickle
from .text import LARGEST, parse_fields, read_text
from .together import reading

EMBEDDED = "pocket"  # the name of the model that ships with the package
PACKAGED = (EMBEDDED, "smollm2")  # those that pip brings; `path()` of our modules of these names says where they are
WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)  # either, the first one preferred

_PREFIX = "base_model.model."  # of the names in an adapter's file
_SLACK = 10**7  # numbers that may be made in vain; what is a little wrong is said more exactly later

# of every method's config, what is read here and by those who load it
_COMMON: dict[str, tuple[type, ...]] = {
    "peft_type": (str,),
    "task_type": (str,),
    "base_model_name_or_path": (str,),
    "prompt_format": (str,),
    "modules_to_save": (list,),
}

_NEEDED = ("intervention", "positions")  # which the tensors do not tell

_CARD = """---
{header}
---

# An adapter of representation finetuning (ReFT)

Small learned edits of the hidden states of `{base}`: {edits}. Made with pyreft {version}.
To load them, install that version or a later one{extra}.

```python
import pyreft  # makes PEFT know the method{also}
from peft import PeftModel
from transformers import AutoTokenizer, {kind}

adapter = "."  # the name of this repository, or where its files are
base = {place}
model = PeftModel.from_pretrained({kind}.from_pretrained(base), adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(base)
inputs = tokenizer("A text, in the form of the training", return_tensors="pt")
{call}
```
"""
_GENERATE = """output = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(output, skip_special_tokens=True))"""


def model_card(config: ReftConfig, model: Any) -> str:
    """A model card that a stranger can use: what it is, its base model, and how to load and ask it."""
    base = config.base_model_name_or_path or ""
    front = {"library_name": "peft", "tags": ["reft", "representation-finetuning"]}
    own = packaged(base)
    if base and not own and not os.path.isabs(base):
        front["base_model"] = base
    places = config.expand((config.base_model_shape or {}).get("num_hidden_layers", 0))
    found = {f"{place.intervention} at the tokens {place.positions or 'that each call names'}" for place in places}
    answers = generates(model)
    return _CARD.format(
        header="\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        base=own or base or "BASE_MODEL",
        extra=f", with the base model: `pip install pyreft[{own}]`" if own and own != EMBEDDED else "",
        also=f"\nfrom pyreft import {own}" if own else "",
        place=f"{own}.path()" if own else json.dumps(base or "BASE_MODEL"),
        edits="; ".join(sorted(found)),
        version=version("pyreft"),
        kind=type(model).__name__,
        call=_GENERATE if answers else "print(model(**inputs)[0])",
    )


def packaged(base: str) -> str | None:
    """The name of a base model that pip brings, also of the embedded one's place on any machine; none of others."""
    embedded = Path(base).parts[-3:] == ("pyreft", EMBEDDED, "model")
    return EMBEDDED if embedded else base if base in PACKAGED else None


def remembered(name: str | None) -> str | None:
    """The name by which an adapter remembers its base model: of a copy in the hub's cache, its name on the hub."""
    parts = Path(name or "").parts
    if "snapshots" in parts[1:] and (folder := parts[parts.index("snapshots") - 1]).startswith("models--"):
        return folder.removeprefix("models--").replace("--", "/")
    return name or None


def is_adapter(directory: str | os.PathLike) -> bool:
    """Whether a directory holds an adapter of PEFT, this method's or another's."""
    with reading(directory) as place:
        return (place / CONFIG_NAME).is_file()


def read_config(directory: str | os.PathLike) -> ReftConfig:
    """Return the config of an adapter's directory, checked.

    Raises:
        ReftError: not an adapter, one of another method, or a file that is damaged; a field that is not known or has a
            value that it cannot have, by its name.
    """
    return parse_config(read_config_text(directory), Path(directory) / CONFIG_NAME)


def read_config_data(directory: str | os.PathLike) -> dict[str, Any]:
    """Return the config of an adapter of any method of PEFT, as it stands in the file.

    Raises:
        ReftError: not an adapter, or a file that is damaged.
    """
    return _parse_data(read_config_text(directory), Path(directory) / CONFIG_NAME)


def read_config_text(directory: str | os.PathLike) -> str:
    """Return the text of an adapter's config.

    Raises:
        ReftError: not an adapter, or a file that cannot be read.
    """
    with reading(directory) as place:
        path = place / CONFIG_NAME
        if not path.is_file():
            hint = ""
            if any(place.glob("intkey_*.bin")):
                hint = " It holds files of the original pyreft: load them with ReftModel.load() and save them again."
            raise ReftError(f"{directory}: expected an adapter's directory, found no {CONFIG_NAME}.{hint}")
        return read_text(path, LARGEST)


def parse_config(text: str, path: Path) -> ReftConfig:
    """As `read_config`, from a text that was read from `path`."""
    data = _parse_data(text, path)
    if (kind := data.get("peft_type")) != ReftPeftType.REFT.value:
        raise ReftError(f"{path}: expected an adapter of representation finetuning, this is one of the type {kind!r}.")
    known = inspect.signature(ReftConfig).parameters
    for name in [name for name in data if name not in known]:
        if data.pop(name) is not None:  # what a later PEFT writes and this adapter does not use
            raise ReftError(
                f"{path}: {name}: there is no such field.{did_you_mean(name, known)} If a later version of pyreft or "
                "PEFT wrote it, update; if not, delete it."
            )
    for name in () if data.get("representations") else _NEEDED:
        if data.get(name) is None:  # a default could be another one than the adapter was trained with
            raise ReftError(f"{path}: {name}: the file does not say it; was it edited, or not copied completely?")
    try:
        return ReftConfig(**data)
    except ReftError as error:
        raise ReftError(f"{path}: {error}") from None


def _parse_data(text: str, path: Path) -> dict[str, Any]:
    data = parse_fields(text, path, "an adapter's config")
    for name, kinds in _COMMON.items():
        if data.get(name) is not None:
            check_type(f"{path}: {name}", data[name], *kinds)
    if (kind := data.get("peft_type")) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        near = did_you_mean(kind, PEFT_TYPE_TO_CONFIG_MAPPING)
        raise ReftError(f"{path}: peft_type: expected REFT or another method of PEFT, got {kind!r}.{near}")
    for name in data.get("modules_to_save") or ():
        check_type(f"{path}: modules_to_save", name, str)
    return data


def read_shapes(directory: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of an adapter's tensors without reading them.

    Raises:
        ReftError: the file is missing, damaged or cut short.
    """
    return _read(directory, shapes=True)


def check_room(directory: str | os.PathLike, config: ReftConfig, model: nn.Module) -> None:
    """Refuse a config that asks for far more than its file holds, before anything is made for it.

    Raises:
        ReftError: with the numbers; or places and ranks that the model does not have.
    """
    shapes = read_shapes(directory)
    wanted = tuple(config.modules_to_save or ())
    for path, _ in model.named_modules() if wanted else ():
        if path.endswith(wanted) and not any(name.startswith(f"{_PREFIX}{path}.") for name in shapes):
            raise ReftError(
                f"{directory}: modules_to_save: the file does not fit its config, it has nothing of {path!r}."
            )
    stored = sum(math.prod(shape) for name, shape in shapes.items() if f".{PREFIX}" in name)
    asked = 0
    for entry in representations_of(config, model):
        site = site_of(entry, model)
        try:
            with torch.device("meta"):
                made = entry.make(site.width, site.input_width)
            asked += sum(parameter.numel() for parameter in made.parameters())
        except RuntimeError:  # a class of a user's that cannot be made without values
            continue
        if asked > stored + _SLACK:
            raise ReftError(
                f"{directory}: the file does not fit its config, which asks for {asked:,} numbers or more in its "
                f"edits; {stored:,} are there."
            )


def check_tensors(directory: str | os.PathLike, expected: Mapping[str, Tensor]) -> None:
    """Compare an adapter's tensors with those its config asks for on this model; see `load_tensors`."""
    found = read_shapes(directory)
    check_names(directory, expected, found)
    for name, tensor in expected.items():
        if found[name] != tuple(tensor.shape):
            raise ReftError(
                f"{directory}: {name} has the shape {list(found[name])}, the model needs {list(tensor.shape)}."
            )


def check_names(directory: str | os.PathLike, expected: Collection[str], found: Collection[str]) -> None:
    """Compare the names of an adapter's tensors with those that its config asks for.

    Raises:
        ReftError: with one that is missing, and one that is not known.
    """
    expected, found = set(expected), set(found)
    missing, more = sorted(expected - found), sorted(found - expected)
    if missing or more:
        raise ReftError(
            f"{directory}: the file does not fit its config: {len(missing)} tensors are missing"
            f"{f' ({missing[0]}, ...)' if missing else ''}, {len(more)} are not known"
            f"{f' ({more[0]}, ...)' if more else ''}."
        )


def load_tensors(directory: str | os.PathLike, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors, on the CPU, checked against those of the model that its config asks for.

    Args:
        directory: the adapter's.
        expected: by their names in the file, the tensors of the model that they are for.

    Raises:
        ReftError: a file that is missing or damaged; tensors that are missing, of another shape or kind, or too many;
            numbers that are not finite.
    """
    check_tensors(directory, expected)
    tensors: dict[str, Tensor] = _read(directory)
    for name, tensor in tensors.items():
        check_values(f"{directory}: {name}", tensor, expected[name].is_floating_point())
    return tensors


@contextmanager
def as_it_was(model: nn.Module, directory: str | os.PathLike) -> Iterator[None]:
    """Leave a base model without edits if those of a directory cannot be loaded."""
    modules = dict(model.named_modules())
    try:
        yield
    except BaseException as error:  # also where it is interrupted
        take_back(model, modules)
        if isinstance(error, ReftError) or not isinstance(error, (ValueError, TypeError)):
            raise
        raise ReftError(f"{directory}: {error}") from error


def weights_file(directory: Path) -> Path:
    """The file of an adapter's weights: PEFT prefers safetensors to a pickle, of which we read nothing but tensors.

    Raises:
        ReftError: there is none.
    """
    for name in WEIGHTS:
        if (path := directory / name).is_file():
            return path
    raise ReftError(f"{directory}: the adapter has no {WEIGHTS[0]}; was it copied completely?")


def _read(directory: str | os.PathLike, shapes: bool = False) -> dict[str, Any]:
    """The tensors of an adapter, or their shapes, by name."""
    with reading(directory) as place:
        path = weights_file(place)
        if path.suffix != ".safetensors":
            return {name: tuple(tensor.shape) if shapes else tensor for name, tensor in read_pickle(path).items()}
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                return {n: tuple(file.get_slice(n).get_shape()) if shapes else file.get_tensor(n) for n in names}
        except (SafetensorError, OSError) as error:
            raise ReftError(f"{path}: the file is damaged or was cut short ({error}). Save or copy it again.") from None
