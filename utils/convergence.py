"""The old address of `utils.surface` and `utils.report`."""

from utils.report.over_runs import (  # noqa: F401
    beside_published,
    over_seeds,
    pooled_verdicts,
    ratios_to_first,
    shares_over_seeds,
)
from utils.surface.ball import (  # noqa: F401
    OnBall,
    difference_on_ball,
    distances_on_ball,
    worst_in_ball,
)
from utils.surface.identities import (  # noqa: F401
    ExpectedSteps,
    expected_distance,
    expected_rms,
    expected_steps,
    hessian_squares,
    loss_steps,
    running_means,
    smoothed,
)
from utils.surface.intervals import (  # noqa: F401
    FEWEST,
    FEWEST_RATIOS,
    bootstrap_mean,
    first_crossing,
    log_log_slope,
    rms_by_ratio,
)
from utils.surface.measured import (  # noqa: F401
    COLUMNS,
    measure_distance,
    measure_halves,
    measure_steps,
)
from utils.surface.neighbourhood import (  # noqa: F401
    Eigenspace,
    Spreads,
    gaussian_probes,
    spreads,
    top_eigenspace,
)
from utils.surface.orders import log_grid, random_orders, typical_first_orders  # noqa: F401
from utils.surface.plane import plane_losses  # noqa: F401
from utils.surface.retraining import projected_descent, retrain  # noqa: F401
from utils.surface.verdicts import verdict  # noqa: F401
