"""Data sets: readers with checks, and the split into train, calibration and held-out parts.

Notebook 01 uses this folder. `load_dataset` is the way in; `Dataset` is what comes out of it.
"""

from utils.data.dataset import Dataset, load_dataset
from utils.data.readers import NAMES
from utils.data.synthetic import synthetic_draw, synthetic_teacher

__all__ = ["NAMES", "Dataset", "load_dataset", "synthetic_draw", "synthetic_teacher"]
