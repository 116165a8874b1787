"""The engine: settings, one training step, the loop around it, checkpoints, and runs in their folders."""

from crdnd.engine.checks import check_model, few_images
from crdnd.engine.cost import Counts, Estimate, estimate
from crdnd.engine.history import Epoch, Validation
from crdnd.engine.loop import Listener, Progress
from crdnd.engine.pace import TimeLeft
from crdnd.engine.run import DataSource, Run, distill, is_finished, load_history, make_objective, train
from crdnd.engine.settings import Named, TrainSettings
from crdnd.engine.status import RunStatus, find_runs, read_status
from crdnd.engine.teacher import TeacherCheck, measure_teacher, some_images

__all__ = [
    "Counts",
    "DataSource",
    "Epoch",
    "Estimate",
    "Listener",
    "Named",
    "Progress",
    "Run",
    "RunStatus",
    "TeacherCheck",
    "TimeLeft",
    "TrainSettings",
    "Validation",
    "check_model",
    "distill",
    "estimate",
    "few_images",
    "find_runs",
    "is_finished",
    "load_history",
    "make_objective",
    "measure_teacher",
    "read_status",
    "some_images",
    "train",
]
