"""What the study compares: adapters by method, rank, layers and position rule, and how long each is trained."""

import warnings
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model

from pyreft import ReftConfig, get_reft_model

RULES = ("l1", "l4", "l8", "l16", "f3+l3", "f7+l7", "prompt")
"""The position rules that are compared, with LoReFT of rank 4 in all layers."""

# the paper's DiReFT, not the class Direft
_INTERVENTIONS = {"LoReFT": "loreft", "DiReFT": "nodireft", "RED": "red", "located LoRA": "lora"}


@dataclass(frozen=True)
class Setting:
    """An adapter before it is trained.

    Args:
        method: `LoReFT`, `DiReFT` as the paper has it (`NodireftIntervention`), `RED`, `LoRA` on q and v at every
            token, or `located LoRA` on v and o at the tokens of a rule alone.
        rank: of all but RED.
        positions: of all but LoRA.
        layers: as in `ReftConfig`.
        dropout: of LoRA, located or not; on what it adds, or in PEFT's on what it reads.
    """

    method: str
    rank: int | None = None
    positions: str | None = None
    layers: str = "all"
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """A line that tells it from the others, such as `LoReFT r4 l4`."""
        parts = [self.method, self.rank and f"r{self.rank}", self.positions, self.layers != "all" and self.layers]
        parts.append(self.dropout and f"dropout {self.dropout:g}")
        return " ".join(str(part) for part in parts if part)

    @property
    def is_rule(self) -> bool:
        """Whether it is one of the comparison of position rules."""
        return self == Setting("LoReFT", 4, self.positions) and self.positions in RULES

    @property
    def is_long(self) -> bool:
        """Whether it is trained on the long tasks, too: the position rules, and LoRA at every token or at some."""
        return self.is_rule or ("LoRA" in self.method and self.rank in (1, 8))

    def adapt(self, model: Any) -> Any:
        """Put the untrained adapter on a model."""
        if self.method == "LoRA":
            assert self.rank is not None
            scale = {"r": self.rank, "lora_alpha": 2 * self.rank, "lora_dropout": self.dropout}
            config = LoraConfig(target_modules=["q_proj", "v_proj"], **scale)
            with warnings.catch_warnings():  # PEFT itself still asks for the old name of a property
                warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
                return get_peft_model(model, config)
        intervention = _INTERVENTIONS[self.method]
        rank: dict[str, Any] = {} if self.rank is None else {"low_rank_dimension": self.rank}
        chosen = {"layers": self.layers, "positions": self.positions, "dropout": self.dropout}
        config = ReftConfig(intervention=intervention, **chosen, **rank)
        return get_reft_model(model, config)


@dataclass(frozen=True)
class Plan:
    """How every adapter of a study is trained and scored.

    Args:
        settings: the adapters of the short tasks; the long ones take those that are compared there, `is_long`.
        seeds: how many seeds, each with its own initial values and order of examples.
        lrs: the learning rates to choose from, for each adapter and short task, by its validation split and one more
            seed.
        marks: after how many steps the held-out score is taken; the last one ends the training.
        batch_size: examples of a step.
        heldout: how many held-out examples are asked.
    """

    settings: tuple[Setting, ...]
    seeds: int = 3
    lrs: tuple[float, ...] = (2e-3, 5e-3, 8e-3, 1.2e-2)
    marks: tuple[int, ...] = (20, 40, 80)
    batch_size: int = 8
    heldout: int = 100

    def cells(self, tasks: list[str]) -> list[tuple[Setting, list[str]]]:
        """Every adapter with the tasks, a short one and its long form at most, that one learning rate is chosen for."""
        stems = list(dict.fromkeys(task.removesuffix("-long") for task in tasks))
        found = []
        for setting in self.settings:
            for stem in stems:
                forms = [task for task in tasks if task == stem or (task == f"{stem}-long" and setting.is_long)]
                found += [(setting, forms)] if forms else []
        return found


DEFAULT = Setting("located LoRA", 1, "l16", dropout=0.3)
"""What `ReftConfig()` is."""
FULL = Plan(
    settings=(
        *(Setting("LoReFT", 4, rule) for rule in RULES),
        *(Setting("LoReFT", rank, "l4") for rank in (1, 8)),
        Setting("LoReFT", 4, "l4", "1;2;3"),
        *(Setting("DiReFT", rank, "l4") for rank in (1, 4)),
        Setting("RED", None, "l4"),
        Setting("RED", None, "all"),
        *(Setting("LoRA", rank) for rank in (1, 2, 8)),
        *(Setting("located LoRA", rank, "l16") for rank in (1, 4)),
        DEFAULT,
    )
)
"""What `study.py` does."""
QUICK = Plan(
    settings=(Setting("LoReFT", 4, "l4"), Setting("LoReFT", 4, "f7+l7"), Setting("LoRA", 1)),
    seeds=1,
    lrs=(1e-2,),
    marks=(4, 8),
    heldout=10,
)
"""What `study.py --quick` does: too little to say anything of the adapters."""
