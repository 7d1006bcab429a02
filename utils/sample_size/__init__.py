"""How many samples are enough: a pilot is measured once, sizes are asked of it (notebook 06)."""

from utils.sample_size.answer import SampleSize
from utils.sample_size.coverage import exceedance, true_size
from utils.sample_size.measurement import CRITERIA, pilot
from utils.sample_size.required import required_samples
from utils.sample_size.rivals import baselines
from utils.sample_size.surface import k_surface, surface_forecast
from utils.surface.probes import label_ceiling

__all__ = [
    "CRITERIA",
    "SampleSize",
    "baselines",
    "exceedance",
    "k_surface",
    "label_ceiling",
    "pilot",
    "required_samples",
    "surface_forecast",
    "true_size",
]
