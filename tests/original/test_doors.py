"""The modules of the original by name: what scripts import from them is there, and the same as elsewhere."""

import importlib

import pytest

import pyreft
from pyreft import dataset
from pyreft.dataset import IGNORE_INDEX
from pyreft.reft_model import count_parameters
from pyreft.utils import ReftType

ORIGINAL = """ReftConfig ReftModel TaskType ReftTrainer ReftTrainerForCausalLM ReftTrainerForCausalLMDistributed
ReftTrainerForSequenceClassification NoreftIntervention LoreftIntervention ConsreftIntervention LobireftIntervention
DireftIntervention NodireftIntervention ReftDataCollator ReftDataset ReftRawDataset ReftSupervisedDataset
ReftGenerationDataset ReftPreferenceDataset ReftRewardDataset ReftRewardCollator
make_last_position_supervised_data_module make_multiple_position_supervised_data_module get_intervention_locations
parse_positions get_reft_model""".split()  # noqa: SIM905


def test_all_names_of_the_original_are_there():
    assert len(ORIGINAL) == 26
    assert set(ORIGINAL) <= set(pyreft.__all__)
    assert len(pyreft.__all__) <= 40
    assert all(getattr(pyreft, name) for name in pyreft.__all__)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("config", ["ReftConfig"]),
        ("dataset", [name for name in ORIGINAL if "Dataset" in name or "Collator" in name]),
        ("dataset", [name for name in ORIGINAL if name.startswith(("make_", "get_int", "parse_"))]),
        ("interventions", [name for name in pyreft.__all__ if name.endswith("Intervention")]),
        ("reft_model", ["ReftModel"]),
        ("reft_trainer", ["ReftDataCollator", *(name for name in ORIGINAL if "Trainer" in name)]),
        ("utils", ["ReftModel", "TaskType", "get_reft_model"]),
    ],
)
def test_the_names_of_a_module(module, names):
    door = importlib.import_module(f"pyreft.{module}")
    for name in names:
        assert getattr(door, name) is getattr(pyreft, name)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("dataset", ["ReftClassificationDataset", "make_last_position_supervised_chat_data_module"]),
        ("dataset", ["prompt_input", "prompt_no_input", "no_header_prompt_template"]),
        ("reft_trainer", ["make_data_collator", "make_dataloader"]),
        ("utils", ["ReftType"]),
    ],
)
def test_names_that_only_a_module_had(module, names):
    door = importlib.import_module(f"pyreft.{module}")
    for name in names:
        assert name in door.__all__
        assert hasattr(door, name)


def test_the_templates():
    task = "Below is an instruction that describes a task"
    asked = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    assert dataset.prompt_no_input % "Say" == f"{task}. {asked}Say\n\n### Response:\n"
    assert dataset.prompt_input % ("Say", "it") == (
        f"{task}, paired with an input that provides further context. {asked}Say\n\n### Input:\nit\n\n### Response:\n"
    )
    assert dataset.no_header_prompt_template % "Say" == "### Instruction:\nSay\n\n### Response:\n"


def test_the_methods():
    assert [(kind.name, kind.value) for kind in ReftType] == [("LOREFT", "LOREFT"), ("NLOREFT", "NOREFT")]


def test_the_label_without_loss():
    assert IGNORE_INDEX == -100


def test_parameters_of_any_module_are_counted(model):
    config = pyreft.ReftConfig(layers=1, positions="l1", low_rank_dimension=4, intervention="loreft")
    assert count_parameters(pyreft.get_reft_model(model, config)) == 2 * 32 * 4 + 4
