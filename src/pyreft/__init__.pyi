"""The public names, each listed once: `__init__.py` reads here where a name lives, a type checker what it is."""

from peft import TaskType as TaskType

from .data.supervised import ReftDataCollator as ReftDataCollator
from .errors import ReftError as ReftError
from .interventions import ConsreftIntervention as ConsreftIntervention
from .interventions import DireftIntervention as DireftIntervention
from .interventions import LobireftIntervention as LobireftIntervention
from .interventions import LoreftIntervention as LoreftIntervention
from .interventions import NodireftIntervention as NodireftIntervention
from .interventions import NoreftIntervention as NoreftIntervention
from .model import ReftModel as ReftModel
from .model import get_reft_model as get_reft_model
from .original.data_modules import (
    make_last_position_supervised_data_module as make_last_position_supervised_data_module,
)
from .original.data_modules import (
    make_multiple_position_supervised_data_module as make_multiple_position_supervised_data_module,
)
from .original.datasets import ReftDataset as ReftDataset
from .original.datasets import ReftRawDataset as ReftRawDataset
from .original.instructions import ReftGenerationDataset as ReftGenerationDataset
from .original.instructions import ReftPreferenceDataset as ReftPreferenceDataset
from .original.instructions import ReftSupervisedDataset as ReftSupervisedDataset
from .original.locations import get_intervention_locations as get_intervention_locations
from .original.locations import parse_positions as parse_positions
from .original.reward import ReftRewardCollator as ReftRewardCollator
from .original.reward import ReftRewardDataset as ReftRewardDataset
from .steering import diff_mean as diff_mean
from .training.trainer import ReftTrainer as ReftTrainer
from .training.trainer import ReftTrainerForCausalLM as ReftTrainerForCausalLM
from .training.trainer import ReftTrainerForCausalLMDistributed as ReftTrainerForCausalLMDistributed
from .training.trainer import ReftTrainerForSequenceClassification as ReftTrainerForSequenceClassification
from .tuner.config import ReftConfig as ReftConfig
from .tuning.search import tune as tune

__version__: str
