"""Base models by name: load one with its tokenizer, or the one that an adapter was made for."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, TaskType, get_peft_model_state_dict
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from . import pocket, smollm2
from .errors import ReftError, is_disk_full
from .files.adapter import EMBEDDED, check_names, packaged, read_config, read_config_data, read_shapes
from .files.record import read_record
from .files.together import reading
from .model import ReftModel
from .tuner.config import ReftPeftType, shape_differences
from .tuner.injection import base_model_shape
from .tuner.values import check_values


def load_base(
    name: str | None = None, dtype: str = "auto", labels: int | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return a causal language model in evaluation mode, and its tokenizer, ready to pad.

    Args:
        name: a directory, a name on the hub, `"smollm2"` (see `pyreft.smollm2`), or `"pocket"` for the embedded model,
            which is the default.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: as stored on a GPU, float32 on a CPU.
        labels: how many outputs a classifier has, to load one instead of a language model.

    Raises:
        ReftError: no such model, one that cannot do this, an unknown type, or a tokenizer that has neither a padding
            nor an EOS token.
    """
    gpu = torch.cuda.is_available()
    kinds = {"auto": "auto" if gpu else torch.float32}
    kinds |= {kind: getattr(torch, kind) for kind in ("float32", "bfloat16", "float16")}
    if dtype not in kinds:
        raise ReftError(f"expected {', '.join(kinds)}, got {dtype!r}.", setting="dtype")
    if labels is None:
        check_language_model(name)
    else:
        check_classifier(name)
    tokenizer = load_tokenizer(name)
    loader = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    options = {} if labels is None else {"num_labels": labels}
    with _explained(name) as place:
        model = loader.from_pretrained(place, dtype=kinds[dtype], device_map="auto" if gpu else None, **options)
    if name == smollm2.NAME:
        model.name_or_path = name  # an adapter remembers the name: another machine has the model elsewhere
    if labels is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # a decoder finds its last token by it
    if labels is None:
        _end_with(model, tokenizer.eos_token_id)
    return model.eval(), tokenizer


def _end_with(model: Any, token: int | None) -> None:
    """Let answers end at the tokenizer's EOS token, too, with which they are trained to end."""
    config = getattr(model, "generation_config", None)
    if config is None or token is None:
        return
    ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else list(config.eos_token_id or ())
    if token not in ends:
        config.eos_token_id = [*ends, token]


def load_tokenizer(name: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a base model, with a padding token; see `load_base`."""
    with _explained(name) as place:
        tokenizer = AutoTokenizer.from_pretrained(place)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ReftError(
                f"the tokenizer of {name!r} has neither a padding nor an EOS token; set one in it.", setting="model"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_adapted(
    adapter: str | os.PathLike, name: str | None = None, dtype: str = "auto", labels: int | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return an adapter on its base model, and the tokenizer.

    Args:
        adapter: the adapter's directory; of this method, or of another one of PEFT, such as LoRA.
        name: the base model, if not the one that the adapter remembers.
        labels: see `load_base`.

    Raises:
        ReftError: a damaged adapter, a base model that is gone or another one, a classifier that is not there, or one
            where a language model is wanted.
    """
    name = name or base_of(adapter)
    shapes = read_shapes(adapter)  # a damaged file is told before a large model is loaded
    kind = read_config_data(adapter)
    if labels is None:
        check_generates(adapter)
    else:
        _check_classifier(adapter, kind.get("modules_to_save") or (), shapes, labels)
    model, tokenizer = load_base(name, dtype, labels)
    if kind.get("peft_type") == ReftPeftType.REFT.value:
        return ReftModel.from_pretrained(model, adapter), tokenizer
    try:
        with reading(adapter):
            adapted = PeftModel.from_pretrained(model, adapter).eval()
    except (RuntimeError, ValueError, TypeError) as error:  # other sizes, or other modules; a setting of another type
        first = str(error).strip().splitlines()[0]
        raise ReftError(f"{adapter}: the adapter does not fit the base model {name!r}: {first}") from None
    _check_loaded(adapter, adapted, shapes)
    return adapted, tokenizer


def _check_loaded(adapter: Any, adapted: PeftModel, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse tensors of another method that PEFT left out or made by itself, of which it warns at most."""
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    check_names(adapter, expected, shapes.keys() - adapted.state_dict().keys() | shapes.keys() & expected.keys())
    for tensor_name, tensor in expected.items():
        check_values(f"{adapter}: {tensor_name}", tensor)


def check_rules(adapter: str | os.PathLike) -> None:
    """Refuse an adapter some of whose edits are at tokens that each call names, where nobody names any.

    Raises:
        ReftError: it is one.
    """
    if read_config_data(adapter).get("peft_type") != ReftPeftType.REFT.value:
        return
    config = read_config(adapter)
    if any(
        place.positions is None for place in config.expand((config.base_model_shape or {}).get("num_hidden_layers"))
    ):
        raise ReftError(
            f"{adapter}: the adapter has no position rule: its tokens come with each call, and here it would "
            "edit none. Make it with ReftConfig(positions=...)."
        )


def least_prompt(adapter: str | os.PathLike) -> int:
    """How many tokens a prompt needs for an adapter to edit any of them, see `Positions.least`."""
    if read_config_data(adapter).get("peft_type") != ReftPeftType.REFT.value:
        return 0
    config = read_config(adapter)
    places = config.expand((config.base_model_shape or {}).get("num_hidden_layers"))
    return min((rule.least for place in places if (rule := place.rule()) is not None), default=0)


def check_adapter(adapter: str | os.PathLike, name: str | None = None) -> None:
    """Refuse an adapter that is damaged or does not fit its base model, before any weights are loaded.

    Of an adapter of another method, such as LoRA, only the files are checked.

    Args:
        name: the base model, if not the one that the adapter remembers.

    Raises:
        ReftError: what is wrong.
    """
    name = name or base_of(adapter)
    read_shapes(adapter)
    config = read_model_config(name)
    if read_config_data(adapter).get("peft_type") != ReftPeftType.REFT.value:
        return
    kinds: list[Any] = [AutoModel]
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:  # of some models for pictures, the language model alone
        kinds.insert(0, AutoModelForCausalLM)
    with _explained(name), torch.device("meta"):
        models = [kind.from_config(config) for kind in kinds]
    expected, found = read_config(adapter).base_model_shape, [base_model_shape(model) for model in models]
    if expected is not None and expected not in found:
        raise ReftError(
            f"{adapter}: the adapter does not fit {name!r}, which has {shape_differences(expected, found[0])}."
        )


def check_generates(adapter: str | os.PathLike) -> None:
    """Refuse the adapter of a classifier, which was trained together with modules that a language model does not have.

    Raises:
        ReftError: it is one, with its task as far as the record beside it says it.
    """
    data, task = read_config_data(adapter), read_record(adapter).get("task")
    saved = data.get("modules_to_save") or ()
    trained = saved and (task or any(name in saved for name in SEQ_CLS_HEAD_NAMES))
    if trained or data.get("task_type") == TaskType.SEQ_CLS:
        how = f"`pyreft eval {adapter} --suite glue`" if task else "load it with a model for sequence classification"
        raise ReftError(
            f"{adapter}: this is a classifier's adapter{f', for {task}' if task else ''}; it cannot be asked to "
            f"generate. To use it, {how}."
        )


def base_of(adapter: str | os.PathLike) -> str:
    """Return the name of the base model that an adapter remembers.

    Raises:
        ReftError: it remembers none, or a directory that is gone.
    """
    name = read_config_data(adapter).get("base_model_name_or_path")
    if name is None:
        raise ReftError(f"{adapter}: the adapter does not say what its base model is; name it.")
    # an adapter of the embedded model may come from another machine, where the package lies elsewhere
    if not os.path.isdir(name) and (own := packaged(name)) is not None:
        return own
    if os.path.isabs(name) and not os.path.isdir(name):
        raise ReftError(f"{adapter}: its base model {name!r} is not there any more; name the place where it is now.")
    return name


def read_model_config(name: str | None) -> Any:
    """Return the config of a base model, which tells its kind and sizes without loading it.

    Raises:
        ReftError: no such model.
    """
    with _explained(name) as place:
        return AutoConfig.from_pretrained(place)


def check_language_model(name: str | None) -> None:
    """Refuse a base model that was saved as anything but a causal language model, before it is loaded.

    An encoder or a bare backbone has no unembedding in its files; loading it as a language model makes a random one.

    Raises:
        ReftError: no such model, or one of another kind.
    """
    saved = read_model_config(name).architectures or []
    known: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known |= {names} if isinstance(names, str) else set(names)
    if saved and not known & set(saved):
        raise ReftError(
            f"expected a causal language model, {base_path(name)!r} holds a {saved[0]}, which has no unembedding "
            "for one. Load it with its own class and use the functions of pyreft on it.",
            setting="model",
        )


def check_classifier(name: str | None) -> None:
    """Refuse a base model for which transformers has no classifier of texts, before it is loaded.

    Raises:
        ReftError: no such model, or one of another kind.
    """
    kind = read_model_config(name).model_type
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise ReftError(
            f"expected a model with a classifier of texts, such as RoBERTa; transformers has none for "
            f"{base_path(name)!r}, which is a {kind}.",
            setting="model",
        )


def _check_classifier(adapter: Any, names: Any, shapes: dict[str, tuple[int, ...]], labels: int) -> None:
    outputs = {shape[0] for name, shape in shapes.items() if set(names) & set(name.split("."))}
    if not outputs:
        raise ReftError(
            f"{adapter}: expected an adapter with a trained classifier, this one has none; was it trained for "
            "generation? `pyreft train glue --task ...` trains one."
        )
    if labels not in outputs:
        raise ReftError(f"{adapter}: its classifier was not trained for {labels} outputs, which this task has.")


def base_path(name: str | None) -> str:
    """What transformers loads for a base model's name: a directory, or a name on the hub.

    Raises:
        ReftError: `"smollm2"`, and it cannot be made; see `smollm2.path`.
    """
    if name == smollm2.NAME:
        return smollm2.path()
    return pocket.path() if name in (None, EMBEDDED) else str(name)


@contextmanager
def _explained(name: str | None) -> Iterator[str]:
    """Load from what a name stands for, which is given; what goes wrong is told with it."""
    place = base_path(name)
    try:
        yield place
    except (OSError, ValueError) as error:
        if is_disk_full(error):  # while it was downloaded
            raise
        first = str(error).strip().splitlines()[0]
        if os.path.isfile(place):
            first = "this is a file; expected the directory of a model."
        elif place.startswith(("/", "./", "../", "~")) and not os.path.exists(place):
            first = "there is no such directory."
        raise ReftError(f"none could be loaded from {place!r}: {first}", setting="model") from None
