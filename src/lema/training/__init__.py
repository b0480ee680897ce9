"""The loop around steps: schedule, evaluation, checkpoints' folder, metrics, what one sees, how it stops.

This room knows an engine only by what it asks of one (`engine.TrainingEngine`); it knows nothing of weights or models.
"""

from .callbacks import TrainerCallback
from .config import TrainingConfig
from .result import TrainResult
from .run_config import RunConfig

__all__ = ["RunConfig", "TrainResult", "TrainerCallback", "TrainingConfig"]
