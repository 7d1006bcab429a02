"""Rows as benchmark.csv and as the tables of docs/benchmark.md."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from utils.hessian.losses import MEMORY
from utils.run.files import atomic
from workflow.benchmark.settings import BASES, MODELS, TASKS
from workflow.pages import fill


def shown(row: dict) -> bool:
    """Whether the page shows a row: every method for the norms of one model, else ours and the
    base."""
    if row["task"] == "norms" and row["model"] == "small-trained":
        return row["base"] == BASES["norms"][0]
    if row["task"] != "norms" and row["model"] == "small-40-step":
        return False
    return row["dtype"] == "float64" and row["method"] in ("ours", BASES[row["task"]][0])


def table(frame: pd.DataFrame) -> str:
    """The rows that the page shows as Markdown, a table a device, the CPU's first; the CSV has
    them all."""
    groups = frame.groupby("device", sort=False)
    return "\n\n".join(
        table_of(groups.get_group(d)) for d in sorted(groups.groups, key=lambda d: (d != "cpu", d))
    )


def table_of(frame: pd.DataFrame) -> str:
    """The rows of one device, with what they have in common below."""

    def pair(row, names, form):
        return " / ".join(form.format(row[name]) for name in names if not pd.isna(row[name]))

    lines = [
        "task | model | method | ms per unit | times faster than the base | error, median / worst"
    ]
    lines = [f"{lines[0]} | within 1e-3 / not converged | target", " | ".join(["---"] * 8)]
    for row in filter(shown, frame[frame["task"] != "memory"].to_dict("records")):
        ratio = "1 (base)"
        if row["method"] != row["base"]:
            ratio = f"{row['ratio']:.3g} ({row['ratio_low']:.3g} to {row['ratio_high']:.3g})"
        if row["base"] != BASES[row["task"]][0]:
            ratio += f" over {row['base']}"
        cells = [TASKS[row["task"]][0].format(row["n"]), row["model"].replace("-", " ", 1)]
        cells += [
            row["method"] + ", float32" * (row["dtype"] == "float32"),
            f"{row['ms_per_unit']:.3g}",
            ratio,
        ]
        cells += [pair(row, ("error_median", "error_worst"), "{:.0e}")]
        cells += [pair(row, ("within_1e-3", "not_converged"), "{:.0%}")]
        lines.append(
            " | ".join(
                [*cells, "" if pd.isna(row["target"]) else f"x{row['target']:g}: {row['reached']}"]
            )
        )
    text = "\n".join(f"| {line} |" for line in lines) + "\n"
    for model, group in frame[frame["task"] == "memory"].groupby("model", sort=False):
        peaks = ", ".join(
            f"{r.peak_mib:.0f} MiB for {r.n} samples ({r.base})" for r in group.itertuples()
        )
        grows = "it does not grow" if group["reached"].iloc[-1] == "reached" else "it grows"
        budget = f"at the default budget of {MEMORY / 2**30:g} GiB"
        text += f"\nPeak memory of the per-sample norms, {model}, {budget}: {peaks}; {grows}.\n"
    about = (
        f"{name} {', '.join(map(str, frame[name].unique()))}"
        for name in ("device", "torch", "threads", "rounds")
    )
    note = "float64 unless said otherwise; ratios: median and range over the rounds."
    return f"{text}\n{'; '.join(about)}; {note}"


def merge(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """With the rows of an earlier run, where this one did not take the same task on the same model
    and device."""
    if path.is_file():
        key, old = ["task", "model", "device"], pd.read_csv(path)
        new = set(frame[key].itertuples(index=False, name=None))
        frame = pd.concat(
            [old[[row not in new for row in old[key].itertuples(index=False, name=None)]], frame]
        )
    order = {name: place for place, name in enumerate([*TASKS, *MODELS])}
    return frame.sort_values(
        ["task", "model"], key=lambda c: c.map(order), kind="stable", ignore_index=True
    )


def write(frame: pd.DataFrame, path: Path, page: Path) -> None:
    """The CSV, and the table between the markers `benchmark` of the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    fill(page, "benchmark", table(frame))
