"""What the runs of a study found together: notebook 07."""

from utils.report.over_runs import (
    beside_published,
    over_seeds,
    pooled_verdicts,
    ratios_to_first,
    share_interval,
    shares_over_seeds,
)

__all__ = [
    "beside_published",
    "over_seeds",
    "pooled_verdicts",
    "ratios_to_first",
    "share_interval",
    "shares_over_seeds",
]
