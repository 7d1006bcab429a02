"""How the empirical loss surface settles: at fixed weights, around them, and by retraining.

Notebook 05. `orders` in which examples arrive, `identities` that hold for any list of numbers,
`measured` beside them, `intervals`; then `neighbourhood` (in mean square), `ball` and
`inequalities` (in the worst case), `retraining`, `pictures`, and `verdicts` over all of it.
"""

from utils.surface.ball import difference_on_ball
from utils.surface.identities import (
    expected_distance,
    expected_rms,
    expected_steps,
    loss_steps,
    running_means,
)
from utils.surface.neighbourhood import spreads
from utils.surface.orders import log_grid, random_orders
from utils.surface.verdicts import verdict

__all__ = [
    "difference_on_ball",
    "expected_distance",
    "expected_rms",
    "expected_steps",
    "log_grid",
    "loss_steps",
    "random_orders",
    "running_means",
    "spreads",
    "verdict",
]
