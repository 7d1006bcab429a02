"""Which networks the committed studies measure, and how much they have learned."""

from __future__ import annotations

import pandas as pd

from utils.run import RESULTS

STUDIES = [
    "quickstart",
    "digits_convergence",
    "vit_mnist",
    "ccg_mnist",
    "uh_table_a",
    "vit_cifar10",
]


def networks_table() -> str:
    """The networks of the committed studies as a table of Markdown, a row a study and data set.

    Returns six columns: accuracies are shares of the examples classified right, least to greatest
    over the networks; a network is stationary where training ended by its stopping rule.

    Raises FileNotFoundError where a study has no committed runs.csv.

    >>> print(networks_table().splitlines()[2])
    | quickstart | digits | 1 | 1,079 | 1.00 | .95 | 1 of 1 |
    """
    header = "study | data | networks | training examples | accuracy there | held out | stationary"
    lines = [f"| {header} |", "|---" * 7 + "|"]
    for study in STUDIES:
        runs = pd.read_csv(RESULTS / study / "runs.csv")
        lines += [row_of(study, data, group) for data, group in runs.groupby("data", sort=False)]
    return "\n".join(lines)


def row_of(study: str, data: str, runs: pd.DataFrame) -> str:
    """One row of `networks_table`.

    study  its name
    data   name of the data set
    runs   rows of runs.csv, one a network

    >>> row = {"training": 1000, "accuracy_training": 1.0, "converged": False}
    >>> runs = pd.DataFrame([row | {"accuracy_held_out": a} for a in (0.607, 0.803)])
    >>> row_of("vit_mnist", "mnist", runs)
    '| vit_mnist | mnist | 2 | 1,000 | 1.00 | .61 to .80 | 0 of 2 |'
    """
    cells = [
        study,
        data,
        str(len(runs)),
        f"{runs['training'].max():,}",
        span(runs["accuracy_training"]),
        span(runs["accuracy_held_out"]),
        f"{runs['converged'].sum()} of {len(runs)}",
    ]
    return f"| {' | '.join(cells)} |"


def span(shares: pd.Series) -> str:
    """Least and greatest of some shares, to two digits.

    shares  between 0 and 1

    >>> span(pd.Series([0.098, 0.9232])), span(pd.Series([1.0]))
    ('.10 to .92', '1.00')
    """
    ends = (f"{share:.2f}".removeprefix("0") for share in (shares.min(), shares.max()))
    return " to ".join(dict.fromkeys(ends))
