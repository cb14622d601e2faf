"""What vLLM calls in each of its processes: it makes the model classes known by name and imports none of them."""

from .parent import end_with_parent

PREFIX = "Reft"
ENDINGS = ("ForCausalLM", "LMHeadModel")


def register() -> None:
    """Make `Reft<architecture>` known for every decoder that vLLM has; the entry point in `vllm.general_plugins`."""
    from vllm import ModelRegistry

    end_with_parent()
    for architecture in list(ModelRegistry.models):
        name = f"{PREFIX}{architecture}"
        if architecture.endswith(ENDINGS) and not architecture.startswith(PREFIX) and name not in ModelRegistry.models:
            ModelRegistry.register_model(name, f"pyreft.serving.vllm.models:{name}")
