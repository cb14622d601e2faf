"""Adapters of the embedded model with large random edits, for the tests of serving."""

import time
from types import SimpleNamespace

import torch

import pyreft
from pyreft import pocket

RULES = {"l4": "l4", "l16": "l16", "f3l3": "f3+l3", "prompt": "prompt", "all": "all"}
LORA = {"lora": "l16", "lora-all": "all"}  # edits inside of blocks, by name their rule
PARTS = ["query_output", "key_output", "value_output", "attention_output", "gate_output", "up_output", "mlp_output"]


def save(directory, *, seed=0, scale=0.3, **config):
    """Write an adapter of the embedded model whose edits are far from nothing."""
    model, _ = pocket.load()
    torch.manual_seed(seed)
    adapted = pyreft.get_reft_model(
        model, pyreft.ReftConfig(**{"intervention": "loreft", "low_rank_dimension": 4, **config})
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "reft_" in name:
                parameter.add_(scale * torch.randn_like(parameter))
    adapted.eval().save_pretrained(str(directory))
    return directory


def save_all(root):
    """Write an adapter for each kind of rule into a directory."""
    for seed, (name, rule) in enumerate(RULES.items()):
        save(root / name, seed=seed, positions=rule)
    return root


def save_lora(root):
    """Write those of `LORA` into a directory, which edit all parts of blocks that can be served."""
    for name, rule in LORA.items():
        save(root / name, seed=9, positions=rule, intervention="lora", component=PARTS)
    return root


def engine(settings, *, graphs=False):
    """An engine's configuration as far as the plug-in reads it, for the embedded model."""
    model = SimpleNamespace(
        hf_config=pocket.load()[0].config,
        hf_text_config=SimpleNamespace(hidden_size=192, num_hidden_layers=7),
    )
    return SimpleNamespace(
        additional_config=settings.write(),
        model_config=model,
        # the device's type says what vLLM may do, the device where tensors are
        device_config=SimpleNamespace(device_type="cuda" if graphs else "cpu", device="cpu"),
        compilation_config=SimpleNamespace(
            cudagraph_mode=SimpleNamespace(name="FULL" if graphs else "NONE"), pass_config=SimpleNamespace()
        ),
        parallel_config=SimpleNamespace(),
        speculative_config=None,
        kv_transfer_config=None,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
        instance_id=object(),
        use_v2_model_runner=False,
    )


class Running:
    """A server in a thread of this process, at a free port, on the embedded model."""

    def __init__(self, adapters, store, **options):
        from pyreft.serving.api.listening import Options, make_server, serving

        defaults = {"port": 0, "slots": 8, "cache": 1.0, "max_body": 1.0, "timeout": 60.0, "allow_loading": True}
        self.server = make_server(Options(adapters=adapters, store=store, **defaults | options))
        self.service, self.scheduler = self.server.service, self.server.service.engine.scheduler
        self._within = serving(self.server)
        self.url = self._within.__enter__()

    def stop(self):
        self._within.__exit__(None, None, None)

    def idle(self, seconds=20.0):
        """Wait until nothing runs; whether that was so in time."""
        end = time.monotonic() + seconds
        while any(self.scheduler.counts.values()) and time.monotonic() < end:
            time.sleep(0.01)
        return not any(self.scheduler.counts.values())
