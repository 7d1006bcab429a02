"""How many samples are enough: a pilot is measured once, sizes are asked of it (notebook 06)."""

from utils.sample_size.answer import SampleSize
from utils.sample_size.coverage import exceedance, true_size
from utils.sample_size.measurement import CRITERIA, pilot
from utils.sample_size.probes import label_ceiling
from utils.sample_size.required import required_samples
from utils.sample_size.rivals import baselines
from utils.sample_size.surface import k_surface, surface_forecast

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

# --- shim: names that other files still read off this package; to be deleted at integration -------
from scipy.stats import binomtest

from utils.sample_size.ball import k_ball  # noqa: F401
from utils.sample_size.limits import pair_moments  # noqa: F401
from utils.sample_size.probes import neighbourhood, probe_losses  # noqa: F401
from utils.sample_size.rivals import FAMILIES  # noqa: F401


def clopper_pearson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    interval = binomtest(hits, n).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)
