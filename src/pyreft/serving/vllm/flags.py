"""The plug-in's settings, and what of an engine's configuration cannot go with it."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...errors import ReftError, did_you_mean
from ..catalog import default_store
from ..served import Adapter, check_fits
from .inside import COMPILED, Architecture

KEY = "reft"  # of `additional_config`, and of a request's `extra_args`
STRENGTH = "reft_strength"
STORES: set[str] = set()  # that settings in this process have named


@dataclass(frozen=True)
class Settings:
    """What stands under `"reft"` in an engine's `additional_config`.

    Args:
        adapters: the directory whose folders are the adapters that clients may name; none if there is none.
        slots: how many adapters are on the device at once, and so the most in a batch.
        rank: the greatest rank of an adapter, twice its own if it has an activation in a difference.
        store: the folder for copies by digest, the same for all processes of the engine.
    """

    adapters: str | None = None
    slots: int = 64
    rank: int = 8
    store: str = ""

    @classmethod
    def of(cls, vllm_config: Any) -> "Settings":
        """Read them from an engine's configuration.

        Raises:
            ReftError: an unknown one, or one of another type.
        """
        extra = getattr(vllm_config, "additional_config", None)
        return cls.read(extra.get(KEY) if isinstance(extra, dict) else None)

    @classmethod
    def read(cls, given: Any) -> "Settings":
        """Read them from a dict, none for the defaults."""
        given = {} if given is None else given
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ReftError(
                    f"expected {', '.join(known)} under {KEY!r}, got {name!r}.{did_you_mean(name, known)}",
                    setting="additional_config",
                )
        made = cls(**given)
        for name in ("slots", "rank"):
            value = getattr(made, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ReftError(f"{name}: expected a whole number from 1, got {value!r}.", setting="additional_config")
        made = made if made.store else cls(**{**asdict(made), "store": str(default_store())})
        STORES.add(made.store)
        return made

    def write(self) -> dict[str, Any]:
        """As they stand in `additional_config`."""
        if self.store:
            STORES.add(self.store)
        return {KEY: {name: value for name, value in asdict(self).items() if value is not None}}


def flags(settings: Settings, architecture: str) -> dict[str, Any]:
    """The arguments of `vllm.LLM` that make an engine serve adapters; `vllm serve` has a flag for each.

    Args:
        settings: of the plug-in.
        architecture: of the base model, such as `"LlamaForCausalLM"`, or `"TransformersForCausalLM"`.
    """
    return {
        "hf_overrides": {"architectures": [f"Reft{architecture}"]},
        "additional_config": settings.write(),
        "scheduler_cls": "pyreft.serving.vllm.scheduler.ReftScheduler",
        "logits_processors": ["pyreft.serving.vllm.batch:ReftRows"],
        "worker_extension_cls": "pyreft.serving.vllm.worker.ReftWorker",
    }


def check_engine(vllm_config: Any) -> None:
    """Refuse what an engine with adapters cannot do rightly.

    Raises:
        ReftError: one of these.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "a KV connector, whose cache knows no adapters,": vllm_config.kv_transfer_config is not None,
        "microbatches (enable_dbo)": bool(getattr(parallel, "enable_dbo", False)),
        "sleep mode with CUDA graphs, which loses the adapters' weights,": (
            bool(getattr(model, "enable_sleep_mode", False)) and replays(vllm_config)
        ),
        "prompts given as embeddings": bool(getattr(model, "enable_prompt_embeds", False)),
        "sequence parallelism": bool(getattr(vllm_config.compilation_config.pass_config, "enable_sp", False)),
        "context parallelism": any(
            getattr(parallel, f"{kind}_context_parallel_size", 1) > 1 for kind in ("prefill", "decode")
        ),
    }
    for what, asked in refused.items():
        if asked:
            raise ReftError(f"{what} cannot be used together with adapters; start the engine without.", setting="vLLM")
    if replays(vllm_config) and not vllm_config.use_v2_model_runner:
        raise ReftError(
            "CUDA graphs replay no edits in vLLM's first model runner; start the engine with --compilation-config "
            '\'{"cudagraph_mode": "NONE"}\', which still compiles, or with VLLM_USE_V2_MODEL_RUNNER=1.',
            setting="vLLM",
        )


def replays(vllm_config: Any) -> bool:
    """Whether an engine replays its model from CUDA graphs, so that edits need shapes that do not change."""
    mode = getattr(vllm_config.compilation_config, "cudagraph_mode", None)
    return vllm_config.device_config.device_type != "cpu" and mode is not None and mode.name != "NONE"


def compiles(vllm_config: Any) -> bool:
    """Whether an engine compiles its model, so that hooks must be there before."""
    return bool(getattr(vllm_config.compilation_config, "mode", 0))


def shape_of(vllm_config: Any) -> dict[str, Any]:
    """Type and sizes of the engine's base model, as adapters name theirs."""
    model = vllm_config.model_config
    text = model.hf_text_config
    return {
        "model_type": getattr(model.hf_config, "model_type", None),
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
    }


def check_adapter(adapter: Adapter, vllm_config: Any) -> None:
    """Refuse an adapter that does not fit the engine, by its config and by its weights.

    Raises:
        ReftError: see `check_config`; or weights of other widths than the model has inside of its blocks.
    """
    check_config(adapter, vllm_config)
    if adapter.parts_inside:
        Architecture.of(vllm_config).check(adapter)


def check_config(adapter: Adapter, vllm_config: Any) -> None:
    """Refuse an adapter whose config says that it does not fit the engine.

    Raises:
        ReftError: one of another base model, of a rank above the slots', or one that a CUDA graph cannot replay.
    """
    check_fits(adapter, Settings.of(vllm_config).rank, shape_of(vllm_config))
    if adapter.parts_inside and getattr(vllm_config.parallel_config, "tensor_parallel_size", 1) > 1:
        raise ReftError(
            f"an edit of {adapter.parts_inside[0]}, inside of a block, cannot be served with tensor parallelism, which "
            "parts what it reads or writes; start the engine without.",
            setting="vLLM",
        )
    others = [part for part in adapter.parts_inside if part not in COMPILED]
    if others and compiles(vllm_config):
        raise ReftError(
            f"an edit of {others[0]} cannot be served by a compiled model, which edits {' and '.join(COMPILED)} inside "
            "of its blocks; start the engine with --enforce-eager.",
            setting="vLLM",
        )
    if replays(vllm_config) and adapter.beyond_low_rank:
        raise ReftError(
            f"{adapter.beyond_low_rank} cannot be replayed in CUDA graphs; start the engine with "
            '--compilation-config \'{"cudagraph_mode": "NONE"}\'.',
            setting="vLLM",
        )


def digest_of(extra_args: dict[str, Any] | None) -> tuple[str, float] | None:
    """The adapter's digest and the strength that a request asks for, none for the base model.

    Raises:
        ReftError: no digest, a strength that is no finite number, or a name like these that is not known.
    """
    for name in extra_args or {}:
        if name.startswith(KEY) and name not in (KEY, STRENGTH):
            raise ReftError(f"expected {KEY} or {STRENGTH}, got {name!r}.", setting="extra_args")
    given = (extra_args or {}).get(KEY)
    if given is None:
        return None
    strength = (extra_args or {}).get(STRENGTH, 1.0)
    if not isinstance(given, str) or len(given) != 64 or set(given) - set("0123456789abcdef"):
        raise ReftError(
            f"{KEY}: expected the digest of an adapter in the store (see pyreft.serving.catalog), got {given!r}."
        )
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not abs(strength) < 1e300:
        raise ReftError(f"{STRENGTH}: expected a finite number, got {strength!r}.")
    return given, float(strength)


def store_of(vllm_config: Any) -> Path:
    """Where an engine's processes find copies by digest."""
    return Path(Settings.of(vllm_config).store)
