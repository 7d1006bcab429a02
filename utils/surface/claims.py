"""What notebook 05 claims, ours and the papers': texts, sources and controls in one place.

Braces stand for what a run measured. `pooled` says how notebook 07 joins the runs of a study: by
"seeds", by "counts" of hits and trials, by the "largest", or by their "range".
"""

from __future__ import annotations

from typing import NamedTuple


class Claim(NamedTuple):
    """A claim: its text, whose it is (a label of the paper, or a publication), and its control.

    >>> Claim("slope, {name}", "prop:rate").text.format(name="trained")
    'slope, trained'
    """

    text: str
    whose: str
    control: str = ""
    pooled: str = "seeds"


ONE_STEP = Claim(
    "slope of the one-step change at fixed weights, {name}",
    "prop:rate",
    "typical losses first: {control}",
)
BRACKET = Claim(
    "mean of the one-step change: share of the k at which it meets its bracket",
    "prop:rate",
    "typical losses first: {early:.2f}",
    "range",
)
BY_CURVATURE = Claim(
    "a slope of -1 at fixed weights shows that curvature makes the surface converge",
    "UH, CCG, P182",
    "{others}; random numbers know no network",
)
SMOOTHING = Claim(
    "a pure 1/(k+1) after the published smoothing, over itself at k = 300",
    "rem:smoothing; P182, UH figures",
    "none: arithmetic of the filter",
)
BATCH = Claim(
    "slope of the change by a batch of {batch}",
    "prop:rate",
    "typical losses first: {control}",
)
DISTANCE = Claim(
    "slope of the distance to the limit in 1/k - 1/n",
    "prop:rate",
    "one step, same fit: {control.value:.3f} [{control.low:.3f}, {control.high:.3f}]"
    "; sorted order: {by_size.value:.3f}",
)
HELD_OUT = Claim(
    "the {part} mean ends at the held-out mean [nat]",
    "design",
    "{other} part: {far:+.1f} standard errors",
)
SETTLED = Claim(
    "distance to the limit, in tau, where the last step falls below tau = S/10",
    "prop:two-questions; P182, PHD stop there",
    "none: S cancels, so every list of losses gives it",
)
MEAN_SQUARE = Claim(
    "slope of the distance in mean square, {kind}, R = {fraction:g} |w0|",
    "thm:neighbourhood",
    "one step, same fit: {control}",
)
CRITERION = Claim(
    "slope of {label}",
    "thm:neighbourhood",
    "two subsamples that share half: {control}",
)
PUBLISHED_CRITERION = Claim("slope of {name} as published", "CAP", "none; ours: {ours}")
CLOSED_FORM = Claim(
    "closed form of Delta2 within 10 %, {where}, {n_weights} weights: largest sigma examined",
    "prop:gaussian; CAP: 0.002",
    "without the gradient term up to {shorter:.1e}; it falls to {least:.2f} of the truth before",
    "range",
)
REMAINDER = Claim(
    "radius at which the remainder of the quadratic model is half of the change [|w0|]",
    "thm:one-step-ball",
    "a linear network under squared error has no remainder (tests)",
    "range",
)
ON_BALL = "{form}: share of pairs that violate the one-step inequality at one of {radii} radii"
ONE_STEP_BALL = {
    "published": Claim(
        ON_BALL,
        "UH, CCG, P182",
        "the same with the gradient term: {hits[first form]} pairs",
        "counts",
    ),
    "first form": Claim(
        ON_BALL,
        "without its supremum over the ball",
        "with the supremum: {hits[proved]} pairs",
        "counts",
    ),
    "second form": Claim(
        ON_BALL,
        "without its remainder",
        "with the measured remainder: {hits[with remainder]} pairs",
        "counts",
    ),
    "as printed": Claim(
        ON_BALL,
        "CCG theorem 7",
        "with the sample's own loss and norm: {hits[published]} pairs",
        "counts",
    ),
    "proved": Claim(
        ON_BALL,
        "thm:one-step-ball",
        "published form: {hits[published]} of {pairs} pairs"
        "; proved / measured at least {slack:.1g}",
        "counts",
    ),
}
WORST_CASE = Claim(
    "worst case over the ball: of {radii} radii those at which its mean exceeds the proved bound",
    "thm:surface-ball",
    "S alone: exceeded at {without} of {radii} radii; proved / found at least {slack:.1g}",
    "largest",
)
EVERY_LATER_K = Claim(
    "share of orders that stray over the ball at some later k, where the bound is 1/2",
    "thm:surface-ball without its remainder",
    "S alone: {alone[0]:.2f} [{alone[1]:.2f}, {alone[2]:.2f}]",
    "counts",
)
HESSIAN = Claim(
    "slope of the norm of {matrix} ({repeats} orders)",
    "prop:rate (Frobenius)",
    "{beside}: {control}",
)
HESSIAN_STEP = Claim(
    "share of 2M/(k+1) that a step of the Hessian reaches (largest)",
    "cor:hessian-step; CCG, UH",
    "median norm in place of M: exceeded by {beyond:.0%} of the steps",
    "largest",
)
RETRAINING = Claim(
    "slope of the excess L_n(w_k) - L_n(w_n) after retraining, initialisations: {inits}",
    "measured; prop:excess-risk speaks of a ball",
)
EXCESS_RISK = Claim(
    "excess risk over the ball, as a share of 2 sup + gap (largest)",
    "prop:excess-risk",
    "none: both points are among those searched",
    "largest",
)
