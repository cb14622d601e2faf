"""Files in, files out: an adapter's directory is complete or absent, and read without executing anything.

The layout is PEFT's: `adapter_config.json`, `adapter_model.safetensors` and a model card, `README.md`.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..errors import ReftError
from ..tuner.config import ReftConfig, ReftPeftType

# written last: a directory with this file is complete
_LAST = CONFIG_NAME

_CARD = """---
{header}
---

# An adapter of representation finetuning (ReFT)

Small learned edits of the hidden states of `{base}`: {edits}. Made with pyreft {version}.
To load them, install that version or a later one.

```python
import pyreft  # makes PEFT know the method
from peft import PeftModel
from transformers import AutoTokenizer, {kind}

adapter = "."  # the name of this repository, or where its files are
model = PeftModel.from_pretrained({kind}.from_pretrained("{base}"), adapter).eval()
tokenizer = AutoTokenizer.from_pretrained("{base}")
inputs = tokenizer("A text, in the form of the training", return_tensors="pt")
{call}
```
"""
_GENERATE = """output = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(output, skip_special_tokens=True))"""


def write_beside(directory: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Let `write` fill a new directory beside the target, then move its files in; on any failure nothing is left.

    Other files of the target directory stay.
    """
    target = Path(directory)
    if target.is_file():
        raise ReftError(f"{target}: expected a directory to save in, this is a file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write(str(staged))
        files = [path.relative_to(staged) for path in sorted(staged.rglob("*")) if path.is_file()]
        for name in sorted(files, key=lambda path: path.name == _LAST):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged / name, target / name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def model_card(config: ReftConfig, model: Any) -> str:
    """A model card that a stranger can use: what it is, its base model, and how to load and ask it."""
    base = config.base_model_name_or_path or ""
    front = {"library_name": "peft", "tags": ["reft", "representation-finetuning"]}
    if base and not os.path.isabs(base):
        front["base_model"] = base
    places = config.expand((config.base_model_shape or {}).get("num_hidden_layers", 0))
    found = {f"{place.intervention} at the tokens {place.positions or 'that each call names'}" for place in places}
    answers = hasattr(model, "can_generate") and model.can_generate()
    return _CARD.format(
        header="\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        base=base or "BASE_MODEL",
        edits="; ".join(sorted(found)),
        version=version("pyreft"),
        kind=type(model).__name__,
        call=_GENERATE if answers else "print(model(**inputs)[0])",
    )


def is_adapter(directory: str | os.PathLike) -> bool:
    """Whether a directory holds an adapter of PEFT, this method's or another's."""
    return (Path(directory) / CONFIG_NAME).is_file()


def read_config(directory: str | os.PathLike) -> ReftConfig:
    """Return the config of an adapter's directory, checked.

    Raises:
        ReftError: not an adapter, one of another method, or a file that is damaged.
    """
    data = read_config_data(directory)
    if (kind := data.get("peft_type")) != ReftPeftType.REFT.value:
        raise ReftError(
            f"{Path(directory) / CONFIG_NAME}: expected an adapter of representation finetuning, this is one of the "
            f"type {kind!r}."
        )
    return ReftConfig(**ReftConfig.check_kwargs(**data))


def read_config_data(directory: str | os.PathLike) -> dict[str, Any]:
    """Return the config of an adapter of any method of PEFT, as it stands in the file.

    Raises:
        ReftError: not an adapter, or a file that is damaged.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        hint = ""
        if any(Path(directory).glob("intkey_*.bin")):
            hint = " It holds files of the original pyreft: load them with ReftModel.load() and save them again."
        raise ReftError(f"{directory}: expected an adapter's directory, found no {CONFIG_NAME}.{hint}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReftError(f"{path}: the file is damaged, it is not JSON ({error}).") from None
    if not isinstance(data, dict):
        raise ReftError(f"{path}: expected an adapter's config, this is a list of values or a single one.")
    return data


def read_shapes(directory: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of an adapter's tensors without reading them.

    Raises:
        ReftError: the file is missing, damaged or cut short.
    """
    path = Path(directory) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise ReftError(f"{directory}: the adapter has no {SAFETENSORS_WEIGHTS_NAME}; was it copied completely?")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ReftError(f"{path}: the file is damaged or was cut short ({error}). Save or copy it again.") from None


def check_tensors(directory: str | os.PathLike, expected: dict[str, tuple[int, ...]]) -> None:
    """Compare an adapter's tensors with those its config asks for on this model.

    Raises:
        ReftError: tensors that are missing, of another shape, or too many.
    """
    found = read_shapes(directory)
    missing, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or more:
        raise ReftError(
            f"{directory}: the file does not fit its config: {len(missing)} tensors are missing"
            f"{f' ({missing[0]}, ...)' if missing else ''}, {len(more)} are not known"
            f"{f' ({more[0]}, ...)' if more else ''}."
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ReftError(f"{directory}: {name} has the shape {list(found[name])}, the model needs {list(shape)}.")
