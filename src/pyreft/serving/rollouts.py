"""Samples for GRPO from vLLM: the policy's adapter goes over in each step, some kilobytes; nothing is merged.

The engine holds the base model once and for all steps. It answers with an adapter that is called by the digest of its
files, so a sample is never one of older weights.
"""

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ReftError
from .catalog import Store
from .served import CONFIG, WEIGHTS
from .vllm.flags import KEY, Settings, check_adapter


class Rollouts:
    """What `trl.GRPOTrainer(rollout_func=...)` takes: an answer for each prompt, by the policy as it is then.

    Args:
        engine: a `vllm.LLM` that was made with `pyreft.serving.vllm.flags.flags`, for the trainer's base model; with
            `logprobs_mode="processed_logprobs"`, so that its log-probabilities are those at the trainer's temperature.

    Raises:
        ReftError: an engine without the plug-in, or with other log-probabilities.
    """

    def __init__(self, engine: Any) -> None:
        self.engine, self._config = engine, engine.llm_engine.vllm_config
        architectures = getattr(self._config.model_config.hf_config, "architectures", None) or []
        if not any(str(name).startswith("Reft") for name in architectures):
            raise ReftError("the engine knows no adapters; make it with pyreft.serving.vllm.flags.flags.")
        mode = getattr(self._config.model_config, "logprobs_mode", None)
        if mode != "processed_logprobs":
            raise ReftError(
                f"expected an engine with logprobs_mode='processed_logprobs', got {mode!r}: its log-probabilities "
                "would not be those at the trainer's temperature.",
                setting="logprobs_mode",
            )
        self._store = Store(Settings.of(self._config).store)
        self._digest: str | None = None

    def publish(self, model: nn.Module) -> str:
        """Give the engine an adapted model's adapter as it is now; return its digest.

        Raises:
            ReftError: an adapter that the engine cannot serve.
        """
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)  # type: ignore[operator]
            config, weights = ((Path(folder) / name).read_bytes() for name in (CONFIG, WEIGHTS))
        adapter = self._store.put(config, weights)
        check_adapter(adapter, self._config)
        old, self._digest = self._digest, adapter.digest
        if old not in (None, adapter.digest):
            self._store.discard(str(old))  # its slot goes to whoever needs one
        return adapter.digest

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Answer each prompt once; the trainer gives it as often as it wants answers.

        Returns:
            `prompt_ids`, `completion_ids` and `logprobs`, those of the answers' tokens, each a list for each prompt.
        """
        from vllm import SamplingParams

        digest = self.publish(trainer.accelerator.unwrap_model(trainer.model))
        ids, more = self._encode(prompts, trainer), trainer.args.generation_kwargs or {}
        params = SamplingParams(
            **{
                "temperature": trainer.temperature,
                "top_p": trainer.top_p,
                "top_k": trainer.top_k,
                "min_p": trainer.min_p or 0.0,
                "repetition_penalty": trainer.repetition_penalty,
                "max_tokens": trainer.max_completion_length,
                **more,
                "logprobs": 0,  # of the sampled tokens alone
                "extra_args": {**(more.get("extra_args") or {}), KEY: digest},
            }
        )
        outputs = self.engine.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        if any(answer.finish_reason == "error" for answer in answers):
            raise ReftError("the engine ended a sample with an error, see its log.")
        tokens = [list(answer.token_ids) for answer in answers]
        logprobs = [
            [step[token].logprob for token, step in zip(row, answer.logprobs, strict=True)]
            for row, answer in zip(tokens, answers, strict=True)
        ]
        return {"prompt_ids": ids, "completion_ids": tokens, "logprobs": logprobs}

    @staticmethod
    def _encode(prompts: list[Any], trainer: Any) -> list[list[int]]:
        if isinstance(prompts[0], str):
            return trainer.processing_class(text=prompts)["input_ids"]
        made = trainer.processing_class.apply_chat_template(
            conversation=prompts,
            chat_template=trainer.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **trainer.chat_template_kwargs,
        )
        return made["input_ids"]
