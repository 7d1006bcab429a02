"""What the runs of a study found together: notebook 07.

`over_runs` joins what single runs claim, `tables` and `pictures` show it, `findings` sums it up.
"""

from utils.report.findings import Findings
from utils.report.over_runs import (
    beside_published,
    over_seeds,
    pooled_verdicts,
    ratios_to_first,
    share_interval,
    shares_over_seeds,
)

__all__ = [
    "Findings",
    "beside_published",
    "over_seeds",
    "pooled_verdicts",
    "ratios_to_first",
    "share_interval",
    "shares_over_seeds",
]
