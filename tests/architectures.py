"""The architectures that are tested: how to make a tiny random one, what goes in, and what cannot hold, with a reason.

`python tests/architectures.py > docs/architectures.md` writes the table of the documentation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoConfig

CHECKS = {
    "attach": "edits at every layer, each as wide as the states there",
    "components": "every component is found where the states are",
    "no-op": "a disabled adapter is the base model, bit for bit",
    "reach": "located tokens change; tokens that the edit cannot reach do not",
    "train": "one step lowers the loss, the base stays as it was",
    "cache": "generation with a cache is generation without; decoding after the prompt runs no edit",
    "padding": "a padded batch gives what each row gives alone",
    "reload": "a saved adapter gives the same bits when it is loaded",
}

OF_MLP = ("gate_output", "up_output", "down_output")
MOE = dict.fromkeys(("mlp_activation", *OF_MLP), "each expert has its own tokens")
NO_GATE = {"gate_output": "the MLP has no gate"}
QKV = ("query_output", "key_output", "value_output", "head_query_output", "head_key_output", "head_value_output")
LATENT = dict.fromkeys(QKV[1:3] + QKV[4:], "the cache holds latents, of which each step makes keys and values anew")
ATTENTION = ("attention_input", "attention_value_output", "attention_output", "head_attention_value_output", *QKV)
NO_ATTENTION = dict.fromkeys(ATTENTION, "there is no attention")
NO_MLP = dict.fromkeys(("mlp_input", "mlp_activation", "mlp_output", *OF_MLP), "there is no MLP")
NO_LOSS = {"train": "no loss without a head"}
NOT_GENERATING = {"cache": "does not generate"}
FIXED_SIZE = {"padding": "images have one size"}
EXPERTS_ROUND = 1e-5  # of an expert's matrix product, by how many tokens come to it

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # greedy choices are far apart, so that rounding cannot turn them
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
STACKS = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 1,
}
# deeper than the language model beside it, and of another width
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.2,
}
IMAGE_TOKEN = 95
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True, eq=False)
class Architecture:
    """One row of the table.

    Args:
        name: what people call it.
        make: returns a tiny random model.
        kind: `"causal"`, `"classifier"`, `"encoder"`, `"seq2seq"`, `"image"`, `"image-text"` or `"speech"`.
        without: checks that do not apply, each with the reason.
        lacks: components that it does not have, each with the reason.
        rounding: how far logits that should be equal may be apart, where a kernel depends on what else it computes.
    """

    name: str
    make: Callable[[], Any]
    kind: str = "causal"
    without: dict[str, str] = field(default_factory=dict)
    lacks: dict[str, str] = field(default_factory=dict)
    rounding: float = 0.0

    @property
    def generates(self) -> bool:
        return "cache" not in self.without

    @property
    def stacks(self) -> tuple[str, ...]:
        """The prefixes of its components."""
        return ("encoder.", "decoder.") if self.kind in ("seq2seq", "speech") else ("",)

    def but(self, check: str) -> list[str]:
        """Why a check does not hold, or which components there are not."""
        if check == "components":
            lacking = {why: [name for name in self.lacks if self.lacks[name] == why] for why in self.lacks.values()}
            return [f"without `{'`, `'.join(names)}`: {why}" for why, names in lacking.items()]
        return [self.without[check]] if check in self.without else []

    def inputs(self, model: Any, rows: int = 2, tokens: int = 10) -> dict[str, torch.Tensor]:
        """Random inputs of a forward."""
        draw = torch.Generator().manual_seed(tokens)
        ids = torch.randint(3, 90, (rows, tokens), generator=draw)
        if self.kind == "image":
            return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=draw)}
        if self.kind == "speech":
            features = torch.randn(rows, 8, 40, generator=draw)
            return {"input_features": features, "decoder_input_ids": ids}
        if self.kind == "seq2seq":
            return {"input_ids": ids, "decoder_input_ids": ids.flip(-1)}
        if self.kind == "image-text":
            return {"input_ids": ids} | self.images(model, ids, draw)
        return {"input_ids": ids}

    def images(self, model: Any, ids: torch.Tensor, draw: torch.Generator) -> dict[str, torch.Tensor]:
        """An image for each row, whose four tokens are put near the beginning of `ids`."""
        ids[:, 2:6] = IMAGE_TOKEN
        which = {"qwen2_vl": "mm_token_type_ids", "gemma3": "token_type_ids"}.get(model.config.model_type)
        types = {which: (ids == IMAGE_TOKEN).long()} if which else {}
        if model.config.model_type == "qwen2_vl":
            pixels = torch.randn(len(ids) * 16, 3 * 4 * 4, generator=draw)
            return types | {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * len(ids))}
        return types | {"pixel_values": torch.randn(len(ids), 3, 16, 16, generator=draw)}

    def targets(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What to learn from these inputs."""
        if self.kind in ("classifier", "image"):
            return {"labels": torch.arange(len(next(iter(inputs.values()))))}
        name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
        return {"labels": inputs[name].masked_fill(inputs[name] == IMAGE_TOKEN, -100)}


def by_type(model_type: str, auto: str = "AutoModelForCausalLM", **changes: Any) -> Callable[[], Any]:
    """Return a maker of the model that an auto class makes of a config of this type and the common sizes."""

    def make() -> Any:
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **changes)
        return getattr(transformers, auto).from_config(config).eval()

    return make


def causal(name: str, model_type: str, *, lacks: dict[str, str] | None = None, rounding: float = 0.0, **changes: Any):
    return Architecture(name, by_type(model_type, **SIZES | changes), lacks=lacks or {}, rounding=rounding)


def classifier(name: str, model_type: str, *, lacks: dict[str, str] = NO_GATE, **changes: Any) -> Architecture:
    make = by_type(model_type, "AutoModelForSequenceClassification", **SIZES | changes)
    return Architecture(name, make, "classifier", NOT_GENERATING, lacks)


def seq2seq(name: str, model_type: str, **changes: Any) -> Architecture:
    return Architecture(name, by_type(model_type, "AutoModelForSeq2SeqLM", **changes), "seq2seq", lacks=NO_GATE)


def image_text(name: str, model_type: str, text: dict, vision: dict, **changes: Any) -> Architecture:
    configs = {"text_config": SIZES | text, "vision_config": vision}
    return Architecture(name, by_type(model_type, "AutoModelForImageTextToText", **configs, **changes), "image-text")


def clip_text() -> Any:
    torch.manual_seed(0)
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES | {"eos_token_id": 2})).eval()


def whisper() -> Any:
    torch.manual_seed(0)
    tokens = {"suppress_tokens": [], "begin_suppress_tokens": [], "eos_token_id": 2}
    sizes = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**STACKS | sizes | tokens)).eval()


GPT_OSS_ROPE = {"rope_type": "default", "rope_theta": 1e4}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}

ARCHITECTURES = [
    causal("Llama", "llama"),
    causal("Mistral", "mistral"),
    causal("Mixtral", "mixtral", lacks=MOE, rounding=EXPERTS_ROUND, num_local_experts=6, num_experts_per_tok=2),
    causal("Qwen2", "qwen2"),
    causal("Qwen2-MoE", "qwen2_moe", lacks=MOE, rounding=EXPERTS_ROUND, shared_expert_intermediate_size=32, **EXPERTS),
    causal("Qwen3", "qwen3", head_dim=16),
    causal("Qwen3-MoE", "qwen3_moe", lacks=MOE, rounding=EXPERTS_ROUND, head_dim=16, **EXPERTS),
    causal("Gemma", "gemma", head_dim=16),
    causal("Gemma 2", "gemma2", head_dim=16),
    causal("Gemma 3", "gemma3_text", head_dim=16),
    causal("Phi", "phi", lacks=NO_GATE),
    causal("Phi-3", "phi3"),
    causal("GPT-2", "gpt2", lacks=NO_GATE, n_inner=64),
    causal("GPT-J", "gptj", lacks=NO_GATE, rotary_dim=4, n_inner=64),
    causal("GPT-NeoX", "gpt_neox", lacks=NO_GATE),
    causal(
        "GPT-Neo",
        "gpt_neo",
        lacks=NO_GATE,
        attention_types=[[["global", "local", "global"], 1]],
        num_layers=3,
        num_heads=4,
    ),
    causal("GPT-BigCode", "gpt_bigcode", lacks=NO_GATE, n_inner=64),
    causal("Bloom", "bloom", lacks=NO_GATE),
    causal("Falcon", "falcon", lacks=NO_GATE),
    causal("Falcon 40B", "falcon", lacks=NO_GATE, new_decoder_architecture=True, num_kv_heads=2),
    causal("Falcon RW", "falcon", lacks=NO_GATE, multi_query=False, alibi=True),
    causal("Persimmon", "persimmon", lacks=NO_GATE),
    causal("CodeGen", "codegen", lacks=NO_GATE, rotary_dim=4, n_inner=64),
    causal("MPT", "mpt", lacks=NO_GATE, d_model=32, n_heads=4, n_layers=3, expansion_ratio=2),
    causal("OPT", "opt", lacks=NO_GATE, ffn_dim=64, word_embed_proj_dim=16),
    causal("StableLM", "stablelm"),
    causal("StarCoder2", "starcoder2", lacks=NO_GATE),
    causal("OLMo", "olmo"),
    causal("OLMo 2", "olmo2"),
    causal("Cohere", "cohere"),
    causal("Granite", "granite"),
    causal(
        "DeepSeek-V3",
        "deepseek_v3",
        lacks=LATENT,
        rounding=EXPERTS_ROUND,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        num_key_value_heads=4,
    ),
    causal("SmolLM3", "smollm3"),
    causal(
        "gpt-oss",
        "gpt_oss",
        lacks=MOE,
        rounding=EXPERTS_ROUND,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        rope_parameters=GPT_OSS_ROPE,
    ),
    causal("Mamba", "mamba", lacks=NO_ATTENTION | NO_MLP, state_size=4, time_step_rank=4),
    causal(
        "Mamba 2",
        "mamba2",
        lacks=NO_ATTENTION | NO_MLP,
        state_size=4,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        chunk_size=4,
    ),
    causal("RecurrentGemma", "recurrent_gemma", lru_width=32, attention_window_size=64),
    causal(
        "Jamba",
        "jamba",
        rounding=EXPERTS_ROUND,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    seq2seq(
        "T5",
        "t5",
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        initializer_factor=2.0,
        pad_token_id=0,
        eos_token_id=None,
        decoder_start_token_id=0,
    ),
    seq2seq("BART", "bart", max_position_embeddings=128, **STACKS),
    seq2seq("M2M100", "m2m_100", max_position_embeddings=128, **STACKS),
    classifier("BERT", "bert"),
    classifier("RoBERTa", "roberta"),
    classifier("DeBERTa-v2", "deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16),
    classifier("DistilBERT", "distilbert", dim=32, n_heads=4, n_layers=3, hidden_dim=64),
    classifier("ELECTRA", "electra", embedding_size=16),
    classifier("ModernBERT", "modernbert", lacks={}, cls_token_id=1, sep_token_id=2),
    Architecture(
        "ViT",
        by_type("vit", "AutoModelForImageClassification", **VISION | {"num_hidden_layers": 3, "hidden_size": 32}),
        "image",
        NOT_GENERATING | FIXED_SIZE,
        NO_GATE,
    ),
    Architecture("CLIP's text tower", clip_text, "encoder", NOT_GENERATING | NO_LOSS, NO_GATE),
    image_text(
        "LLaVA",
        "llava",
        {"model_type": "llama"},
        VISION | {"model_type": "clip_vision_model"},
        image_token_index=IMAGE_TOKEN,
    ),
    image_text(
        "Qwen2-VL",
        "qwen2_vl",
        {"rope_parameters": QWEN_ROPE},
        {
            "depth": 5,
            "embed_dim": 24,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=94,
        vision_start_token_id=93,
        vision_end_token_id=92,
    ),
    image_text(
        "Gemma 3 with images",
        "gemma3",
        {"head_dim": 16, "sliding_window": 64},
        VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=94,
        eoi_token_index=93,
    ),
    Architecture("Whisper", whisper, "speech", {"padding": "recordings are padded to one length"}, NO_GATE),
]


def table() -> str:
    """The table of the documentation, in Markdown."""
    lines = [
        "# Architectures",
        "",
        "What is tested on tiny random models of each architecture, in `tests/places/test_architectures.py`. There is "
        "no list of architectures in the library, but for the order of queries, keys and values in one projection: one "
        "that is missing here is likely to work.",
        "",
        "| check | what holds |",
        "|---|---|",
        *(f"| {check} | {meaning} |" for check, meaning in CHECKS.items()),
        "",
        f"| architecture | {' | '.join(CHECKS)} |",
        "|---|" + "---|" * len(CHECKS),
    ]
    notes: dict[str, int] = {}
    for one in ARCHITECTURES:
        cells = []
        for check in CHECKS:
            reasons = one.but(check)
            marks = "".join(f" [{notes.setdefault(reason, len(notes) + 1)}]," for reason in reasons).rstrip(",")
            cells.append(("yes" if check == "components" or not reasons else "–") + marks)
        lines.append(f"| {one.name} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in notes.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
