"""A base model with adapters in slots, ready to be asked."""

import warnings
from typing import Any

from ...data.encode import context_length
from ...errors import ReftError
from ...reach.frozen import longest_plain_row
from ...tuner.injection import base_model_shape
from ..served import Adapter, check_fits
from .requests import Request
from .sampling import Sampling
from .scheduling import Scheduler
from .side_by_side import check_batches
from .slotted import Edits

# what a model's `generation_config` may ask of `generate`, which changes its answers, and is not done here
_UNSERVED = (
    *("num_beams", "num_beam_groups", "penalty_alpha", "dola_layers", "guidance_scale", "watermarking_config"),
    *("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_repetition_penalty", "stop_strings", "top_h"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("sequence_bias", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
)


class Engine:
    """Answers requests with a base model, each with an adapter of its own.

    Args:
        model: a causal language model on one device; it gets hooks, and nothing else may use it.
        tokenizer: its own.
        slots: how many adapters are in memory at once; requests with further ones wait.
        rank: the greatest rank of an adapter.
        rows: how many answers grow at once.
        queue: how many requests may wait.
        cache: for keys and values, in GiB.

    Raises:
        ReftError: a model that cannot be computed in batches, or that lies on several devices.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        slots: int = 64,
        rank: int = 8,
        rows: int = 16,
        queue: int = 64,
        cache: float = 4.0,
    ) -> None:
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1 or any(device.type == "meta" for device in devices):
            raise ReftError("expected a base model on one device; serve it with --engine vllm.", setting="model")
        self.model, self.tokenizer, self.rank = model.eval(), tokenizer, rank
        self.shape = base_model_shape(model)
        # not beyond where a long row would change the positions' angles of those beside it, and of its own first part
        self.context = min(n for n in (context_length(model, tokenizer), longest_plain_row(model.config)) if n)
        # 0 and 1 are what changes nothing
        unserved = [name for name in _UNSERVED if getattr(model.generation_config, name, None) not in (None, 0, 1, [])]
        if unserved:
            warnings.warn(
                f"the model's generation_config asks for {', '.join(unserved)}, which is not served: answers differ "
                "from those of generate.",
                stacklevel=2,
            )
        self.edits = Edits(model, slots=slots, rank=rank)
        room = int(cache * 2**30 / check_batches(model, self.edits))
        self.scheduler = Scheduler(model, tokenizer, self.edits, rows=rows, queue=queue, room=room)

    def check(self, adapter: Adapter) -> None:
        """Refuse an adapter that does not fit.

        Raises:
            ReftError: one of another base model, or of a rank above the slots'.
        """
        check_fits(adapter, self.rank, self.shape)

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen if a request says nothing: as `generate` chooses them."""
        config = self.model.generation_config
        penalty = getattr(config, "repetition_penalty", None) or 1.0
        if not config.do_sample:
            return Sampling(repetition_penalty=penalty)

        def given(name: str, otherwise: float) -> float:
            value = getattr(config, name, None)
            return otherwise if value is None else value

        return Sampling(
            temperature=given("temperature", 1.0),
            top_k=int(given("top_k", 50)),
            top_p=given("top_p", 1.0),
            min_p=given("min_p", 0.0),
            repetition_penalty=penalty,
        )

    @property
    def most(self) -> int | None:
        """The most tokens of an answer if a request says nothing; none for what the context takes."""
        return self.model.generation_config.max_new_tokens

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        found = self.model.generation_config.eos_token_id
        return frozenset([found] if isinstance(found, int) else found or ())

    def check_prompt(self, prompt: list[int]) -> None:
        """Refuse a prompt that the model cannot take.

        Raises:
            ReftError: one without tokens, with one that is none, or so long that no answer fits behind it.
        """
        vocabulary = self.model.config.get_text_config().vocab_size
        if not prompt:
            raise ReftError("expected at least one token, got none.", setting="prompt")
        if any(not 0 <= token < vocabulary for token in prompt):
            raise ReftError(f"expected tokens from 0 to {vocabulary - 1}.", setting="prompt")
        if len(prompt) >= self.context:
            raise ReftError(
                f"the prompt has {len(prompt)} tokens, the model's context {self.context}; shorten it.",
                setting="prompt",
            )

    def submit(self, request: Request) -> None:
        """See `Scheduler.submit`."""
        self.scheduler.submit(request)

    def start(self) -> None:
        """Begin to answer."""
        self.scheduler.start()

    def stop(self, seconds: float = 0.0) -> None:
        """See `Scheduler.stop`."""
        self.scheduler.stop(seconds)
