"""What all notebooks share: parameters, studies, a run's folder, tables, random streams."""

from utils.run.layout import FIGURES, RESULTS, RUNS
from utils.run.parameters import validate
from utils.run.record import record_of
from utils.run.start import begin
from utils.run.streams import generator, numpy_generator
from utils.run.study import read_study
from utils.run.tables import SCHEMAS

__all__ = [
    "FIGURES",
    "RESULTS",
    "RUNS",
    "SCHEMAS",
    "begin",
    "generator",
    "numpy_generator",
    "read_study",
    "record_of",
    "validate",
]
