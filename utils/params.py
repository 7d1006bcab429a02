"""Old name of `utils.run.parameters` and `utils.run.study`."""

from utils.run.fields import Parameters
from utils.run.parameters import (
    MODELS,
    BoundComparison,
    DataPreparation,
    HessianNorms,
    ModelTraining,
    SampleSize,
    StudyReport,
    SurfaceConvergence,
    check,
    validate,
    versions,
)
from utils.run.study import Study, defaults, read_study

__all__ = [
    "MODELS",
    "BoundComparison",
    "DataPreparation",
    "HessianNorms",
    "ModelTraining",
    "Parameters",
    "SampleSize",
    "Study",
    "StudyReport",
    "SurfaceConvergence",
    "check",
    "defaults",
    "read_study",
    "validate",
    "versions",
]
