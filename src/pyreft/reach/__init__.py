"""Training only what an edit can reach: a step that equals the ordinary one and computes a part of it."""

from .callbacks import ReachCallback
from .step import Reach

__all__ = ["Reach", "ReachCallback"]
