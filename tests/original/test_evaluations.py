"""What `original_programs.py` answers under pyreft 0.1.0 (with pyvene 0.1.8 and transformers 4.45.1), it answers here."""

import pytest

from original_programs import by_hooks, composition, evaluation, preferences, steering
from pyreft.interventions.pyvene import (
    DistributedRepresentationIntervention,
    SourcelessIntervention,
    TrainableIntervention,
)
