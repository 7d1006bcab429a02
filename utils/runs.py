"""A run's folder `data/runs/<run>/`: what each notebook reads and writes there, and how it stays consistent.

A stage is one notebook at work on one run. `begin` locks what it writes, and what it reads against writers, and refuses
a missing or stale input (07 locks no run: `finish` looks again whether one changed); 04, 05 and 06 may work side by
side. Results go to temporary names and `finish` renames them
all, so a stage that fails leaves everything as it was.
`run.json` says, per stage, with what parameters, versions and inputs its files were made.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from utils.params import Parameters, read_study, versions

RUNS, RESULTS, FIGURES = Path("data/runs"), Path("data/results"), Path("figures")  # below the project's root

# stage: (files it needs, files it writes); it may also read other files of the stages that made those it needs
_DATA, _MODEL = ["dataset.npz", "dataset.json"], ["model.safetensors", "model.json"]
STAGES: dict[str, tuple[list[str], list[str]]] = {
    "01": ([], _DATA),
    "02": (_DATA, [*_MODEL, "training.csv"]),
    "03": (
        _DATA + _MODEL,
        ["per_sample_norms.csv", "hessian_norms.csv", "trace.csv", "blocks.csv", "spectrum.csv", "estimators.csv"],
    ),
    "04": (_DATA + _MODEL + ["per_sample_norms.csv"], ["bounds.csv"]),
    "05": (_DATA + _MODEL + ["per_sample_norms.csv", "hessian_norms.csv"], ["convergence.csv", "verdicts.csv"]),
    "06": (_DATA + _MODEL, ["sample_size.csv"]),
    "07": ([], ["findings.csv", "runs.csv"]),  # reads every table of every run of its study, pools those it uses
}
PRODUCER = {file: stage for stage, (_, files) in STAGES.items() for file in files}
SOURCES = {stage: sorted({PRODUCER[file] for file in needs}) for stage, (needs, _) in STAGES.items()}

# The data dictionary: file -> column -> (dtype, meaning [unit]). Checked on writing and on reading.
# No device and no wall time here: a table is the same bytes when it is made again; run.json has them.
SCHEMAS: dict[str, dict[str, tuple[str, str]]] = {
    "training.csv": {
        "step": ("int", "epoch of Adam, then iteration of the polishing, counted on [1]"),
        "phase": ("str", "adam (an epoch), l-bfgs or settle (an iteration on the whole part)"),
        "objective": ("float", "training objective L_n(w) + (l2/2)|w - w_init|^2 [nat or squared error]"),
        "gradient_norm": ("float", "Euclidean norm of the objective's gradient [objective]"),
    },
    "hessian_norms.csv": {
        "matrix": ("str", "H_k, H_k - H_n, H_k+1 - H_k, or the slope of one of the differences"),
        "part": ("str", "full, gauss_newton or functional"),
        "order": ("int", "random order of the pool whose first k samples are meant, counted on [1]"),
        "k": ("int", "number of training samples in H_k; 0 in the row of a slope [samples]"),
        "n": ("int", "samples of the pool [samples]"),
        "value": ("float", "estimate of the spectral norm [nat per squared unit of weight]; of a slope [1]"),
        "lower": ("float", "rigorous lower end [as value]; of a slope its 95 % bootstrap interval over orders"),
        "upper": ("float", "upper end, nan where none was asked for [as value]"),
        "residual": ("float", "|H v - theta v| of the unit vector v behind the value [as value]"),
        "iterations": ("int", "Hessian-vector products spent [1]"),
        "converged": ("bool", "residual within the tolerance"),
    },
    "estimators.csv": {
        "matrix": ("str", "whose norm: a small dense Hessian, or h_i of held-out samples, trained or untrained"),
        "index": ("int", "position of the sample in the held-out part, 0 for the small Hessian [1]"),
        "estimator": ("str", "exact, lanczos, eigsh, pyhessian (behind its adapter) or pyhessian alone (its defaults)"),
        "value": ("float", "what the estimator reports [nat per squared unit of weight]"),
        "error": ("float", "(value - reference) / reference; the reference is exact or, for samples, lanczos [1]"),
        "residual": ("float", "|H v - theta v| of the vector behind it, nan where there is none [as value]"),
        "iterations": ("int", "Hessian-vector products spent [1]"),
    },
    "blocks.csv": {
        "weights": ("str", "untrained or trained"),
        "row": ("str", "group of parameters"),
        "column": ("str", "group of parameters"),
        "value": ("float", "spectral norm of that block of H_k [nat per squared unit of weight]"),
        "residual": ("float", "|B^T B v - s^2 v| / s of the unit vector behind it [as value]"),
        "k": ("int", "number of training samples [samples]"),
    },
    "spectrum.csv": {
        "sign": ("int", "1 for eigenvalues above the threshold, -1 for those below minus it"),
        "threshold": ("float", "of the eigenvalue's magnitude [nat per squared unit of weight]"),
        "count": ("float", "estimated number of such eigenvalues [1]"),
        "low": ("float", "lower end of its 95 % band over the probes [1]"),
        "high": ("float", "upper end of that band [1]"),
        "probes": ("int", "random starts behind it [1]"),
        "steps": ("int", "Lanczos steps of each [1]"),
        "k": ("int", "number of training samples [samples]"),
    },
    "per_sample_norms.csv": {
        "part": ("str", "training, calibration or held-out"),
        "index": ("int", "position of the sample in its part [1]"),
        "loss": ("float", "loss of the sample [nat or squared error]"),
        "value": ("float", "spectral norm of the sample's Hessian [nat per squared unit of weight]"),
        "lower": ("float", "rigorous lower end [as value]"),
        "upper": ("float", "certified upper end, nan where none was asked for [as value]"),
        "residual": ("float", "|h v - theta v| of the unit vector v behind the value [as value]"),
        "iterations": ("int", "Hessian-vector products spent [1]"),
        "converged": ("bool", "residual within the tolerance"),
    },
    "trace.csv": {
        "parameters": ("str", "coordinates of the trace: all, or the last layer"),
        "part": ("str", "full, gauss_newton or functional"),
        "k": ("int", "number of training samples [samples]"),
        "estimator": ("str", "hutchinson, hutch++, pyhessian (behind its adapter) or exact"),
        "value": ("float", "trace of H_k [nat per squared unit of weight]"),
        "standard_error": ("float", "of the value over the probes, 0 where exact [as value]"),
        "probes": ("int", "random vectors spent, 0 where exact [1]"),
    },
    "bounds.csv": {
        "part": ("str", "training or held-out"),
        "index": ("int", "position of the sample in its part [1]"),
        "rung": ("str", "a rung of utils.bounds (rigorous; the majorant with stated confidence), or certified"),
        "bound": ("float", "bound on the spectral norm of the sample's Hessian [nat per squared unit of weight]"),
        "measured": ("float", "rigorous lower end of the measured norm [as bound]"),
        "ratio": ("float", "bound / measured [1]"),
        "products": ("float", "matrix operations of the rung for one sample [Hessian-vector products of one sample]"),
    },
    "convergence.csv": {
        "experiment": (
            "str",
            "one step, batch, distance, neighbourhood, criterion, ball, distance on ball, later k on ball, hessian, "
            "retraining, projected training or constant",
        ),
        "weights": ("str", "whose losses: trained, a control, a pair of parts, or where the weights were drawn"),
        "k": ("int", "number of samples; 0 in the row of a slope, n for a constant [samples]"),
        "radius": ("float", "distance from the weights w0, for a Gaussian sigma sqrt(P) [fraction of |w0|]"),
        "quantity": (
            "str",
            "mean, rms, slope, a term of the one-step theorem times k + 1 or of the distance over 1 - k/n, a bound, "
            "or what was measured of the retrained weights",
        ),
        "value": ("float", "the measured value [nat; slopes 1; norms nat per squared unit of weight]"),
        "low": (
            "float",
            "lower end of its interval over orders if they suffice: 95 %, slopes of one step 98.75 % [as value]",
        ),
        "high": ("float", "upper end of that interval [as value]"),
        "theory_low": ("float", "exact value or lower end of the proved bracket [as value]"),
        "theory_high": ("float", "exact value or upper end of the proved bracket [as value]"),
        "n": ("int", "random orders, or pairs of weights, behind the value [1]"),
    },
    "verdicts.csv": {
        "claim": ("str", "what is claimed, one row a claim"),
        "whose": ("str", "theorem of ours that says it, or the paper that claims it"),
        "value": ("float", "the measured number"),
        "low": ("float", "lower end of its 95 % interval, or of its range; empty where there is none"),
        "high": ("float", "upper end of that interval"),
        "theory_low": ("float", "what the claim says of it: the value or the lower end"),
        "theory_high": ("float", "the value or the upper end"),
        "verdict": (
            "str",
            "agrees or differs; holds, violated, vacuous, no violation seen or no bound; proves nothing where the "
            "control came out the same; identity, measured, cannot tell",
        ),
        "control": ("str", "the same measurement where the claim should fail, and how it came out"),
        "control_failed": ("bool", "did it come out otherwise than the claim?"),
        "pooled": (
            "str",
            "how notebook 07 joins runs: seeds (t interval), counts (of each seed once), largest or range",
        ),
        "trials": ("int", "pairs or orders behind a share; 0 for other values [1]"),
    },
    "sample_size.csv": {
        "kind": (
            "str",
            "pilot: an answer from the calibration part; check: a rule on held-out data; curve: the figure",
        ),
        "criterion": ("str", "surface, ball, excess, next or step; for a check or the curve the rule that chose k"),
        "tolerance": ("float", "tau [nat or squared error]"),
        "radius": ("float", "of the neighbourhood or the ball [fraction of |w0|]"),
        "confidence": ("float", "1 - delta [1]"),
        "k": (
            "float",
            "central k, no guarantee; of a check or the curve that of the rule, inf: it refuses [samples]",
        ),
        "lower": ("float", "fewer are too few; nan for a rule [samples]"),
        "upper": ("float", "that many are enough; inf where the pilot cannot tell, nan for a rule [samples]"),
        "failures": ("float", "share of the orders that stray further than tau after k samples [1]"),
        "failures_low": ("float", "lower end of its 95 % Clopper-Pearson interval [1]"),
        "failures_high": ("float", "upper end of that interval [1]"),
        "verdict": ("str", "enough, need, cannot tell; for a check kept or broken"),
    },
    "runs.csv": {
        "run": ("str", "name of the run"),
        "data": ("str", "name of the data set"),
        "training": ("int", "samples of the training part [samples]"),
        "calibration": ("int", "samples of the calibration part [samples]"),
        "held_out": ("int", "samples of the held-out part [samples]"),
        "model": ("str", "vit, mlp or PATH.py:function"),
        "parameters": ("int", "number of weights P [1]"),
        "depth": ("float", "transformer blocks, or hidden layers of mlp after the first; nan for your own [1]"),
        "width": ("float", "of the tokens, or of the hidden layers of mlp [1]"),
        "heads": ("float", "attention heads [1]"),
        "norm": ("str", "place of LayerNorm: pre or post, empty where there is none"),
        "l2": ("float", "lambda, weight of the penalty in the objective [1]"),
        "seed": ("int", "of the initial weights and the order of the batches"),
        "gradient_norm": ("float", "Euclidean norm of the objective's gradient at the trained weights [objective]"),
        "threshold": ("float", "of the stopping rule [as gradient_norm]"),
        "converged": ("bool", "did training end by the stopping rule?"),
        "accuracy_training": ("float", "share of the training samples classified right [1]"),
        "accuracy_held_out": ("float", "share of the held-out samples classified right [1]"),
        "torch": ("str", "version of PyTorch, of all if notebooks 02 to 06 had several"),
        "gpu": ("str", "GPU and the notebooks that used it, empty where all ran on the CPU"),
    },
    "findings.csv": {
        "question": ("str", "which of the three questions"),
        "quantity": ("str", "what the value is"),
        "value": ("float", "the measured number"),
        "low": ("float", "lower end of its interval"),
        "high": ("float", "upper end of its interval"),
        "theory": ("float", "what the theory says of it"),
        "verdict": ("str", "how the two compare"),
        "control": ("str", "of a claim on convergence its control, in the first run where there are several"),
        "source": ("str", "notebook, file and theorem it comes from"),
    },
}


# --- files ---------------------------------------------------------------------------------------


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """A temporary path in `path`'s folder, renamed to `path` if the block succeeds, removed if it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _as_json(value) -> str:
    def plain(x):
        if isinstance(x, np.ndarray | np.generic) or hasattr(x, "tolist"):  # arrays, scalars, tensors
            return x.tolist()
        if isinstance(x, tuple | set | Path):
            return str(x) if isinstance(x, Path) else list(x)
        raise TypeError(f"{type(x).__name__} does not go into a JSON file: convert it to numbers, text or lists.")

    return json.dumps(value, indent=1, ensure_ascii=False, default=plain) + "\n"


_DTYPES = {"int": "int64", "float": "float64", "str": "str", "bool": "bool"}


def _fits(column: pd.Series, dtype: str) -> bool:
    api = pd.api.types
    if dtype == "str":
        return all(isinstance(x, str) for x in column)
    if dtype == "bool":
        return api.is_bool_dtype(column)
    if api.is_bool_dtype(column):
        return False
    return api.is_integer_dtype(column) or (dtype == "float" and api.is_float_dtype(column))


def _schema(file: str, pooled: bool) -> dict[str, tuple[str, str]]:
    return ({"run": ("str", "name of the run")} if pooled else {}) | SCHEMAS.get(file, {})


def check_schema(file: str, frame: pd.DataFrame, pooled: bool = False) -> pd.DataFrame:
    """`frame` with the columns, order and dtypes of `SCHEMAS[file]`, after a column `run` where runs are pooled.

    Raises ValueError with one sentence.
    """
    if file not in SCHEMAS:
        raise ValueError(f"{file} has no schema: describe its columns in utils/runs.py, SCHEMAS.")
    schema, columns = _schema(file, pooled), list(frame.columns)
    missing = [c for c in schema if c not in columns]
    extra = [c for c in columns if c not in schema]
    if missing or extra:
        what = [f"lacks the column {missing[0]}"] if missing else []
        what += [f"has the unknown column {extra[0]}"] if extra else []
        raise ValueError(f"{file} {' and '.join(what)}: make it agree with SCHEMAS in utils/runs.py.")
    for column, (dtype, _) in schema.items():
        if not _fits(frame[column], dtype):
            raise ValueError(f"{file} has values in column {column} that are not {dtype}: convert them.")
    return frame[list(schema)].astype({c: _DTYPES[d] for c, (d, _) in schema.items()})


def write_table(path: Path, file: str, frame: pd.DataFrame) -> None:
    """CSV with shortest floats that read back exactly, "nan" for a float that is not there."""
    check_schema(file, frame).to_csv(path, index=False, na_rep="nan", lineterminator="\n")


def read_table(path: Path | str, file: str | None = None, pooled: bool = False) -> pd.DataFrame:
    """Read what `write_table` wrote, bit for bit; `file` names the schema (default: the path's own name)."""
    file = file or Path(path).name
    schema = _schema(file, pooled)
    numbers = {c: ["nan"] for c, (dtype, _) in schema.items() if dtype == "float"}
    kinds = {c: _DTYPES[dtype] for c, (dtype, _) in schema.items()}
    try:
        frame = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values=numbers)
    except (ValueError, pd.errors.ParserError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{path} is not the table that SCHEMAS describes ({reason}): write it anew.") from None
    return check_schema(file, frame, pooled)


# --- what a run's files were made from -----------------------------------------------------------


def record_of(run: str) -> dict:
    """The stages of `run.json`, by stage; empty where there is none."""
    path = RUNS / run / "run.json"
    try:
        return json.loads(path.read_text())["stages"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: delete the folder {path.parent} and start with notebook 01.") from None


def made_by(run: str) -> dict[str, str]:
    """Columns `torch` and `gpu` of runs.csv: with what notebooks 02 to 06 of the run were executed."""
    record = {stage: entry for stage, entry in sorted(record_of(run).items()) if "02" <= stage <= "06"}
    torches, gpus = {entry["versions"]["torch"].partition("+")[0] for entry in record.values()}, {}
    for stage, entry in record.items():
        if entry["device"] != "cpu":
            gpus.setdefault(entry["versions"]["gpu"], []).append(stage)
    gpu = "; ".join(f"{name}: {' '.join(stages)}" for name, stages in gpus.items())
    return {"torch": ", ".join(sorted(torches)), "gpu": gpu}


class _Checked:
    """Hashes of a run's files, each compared with what its notebook, and those before it, read and wrote."""

    def __init__(self, run: str):
        self.run, self.folder, self.record, self.hashes = run, RUNS / run, record_of(run), {}

    def hash(self, file: str) -> str:
        """SHA-256 of an input that is as its producer left it, made from inputs that still are as it read them."""
        if file in self.hashes:
            return self.hashes[file]
        stage = PRODUCER[file]
        if stage not in self.record or not (self.folder / file).is_file():
            raise FileNotFoundError(f"run {self.run!r} has no {file}: run notebook {stage} first.")
        for earlier, seen in self.record[stage]["inputs"].items():
            if self.hash(earlier) != seen:
                raise ValueError(
                    f"{earlier} of run {self.run!r} has changed since notebook {stage} read it: re-run {stage}."
                )
        found = sha256(self.folder / file)
        if found != self.record[stage]["outputs"].get(file):
            raise ValueError(f"{file} of run {self.run!r} is not what notebook {stage} wrote: re-run {stage}.")
        self.hashes[file] = found
        return found


@contextmanager
def _writable(what: str):
    """OSError with one sentence where the block cannot write: a full disk, a folder without permission."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise OSError(
            f"{what} cannot be written ({reason}): make room, or the folder writable; what was there is kept."
        ) from None


_held: dict[Path, int] = {}  # lock files of this process: a notebook that is run again takes its own locks over


def _lock(folder: Path, label: str, stage: str, wait_s: float) -> None:
    """Lock the byte of `stage` in the run's lock file for writing and those of the stages that it reads for reading."""
    path = (folder / ".lock").resolve()
    _unlock(folder)
    with _writable(label):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, start = os.open(path, os.O_RDWR | os.O_CREAT, 0o644), time.monotonic()
    _held[path] = descriptor
    for byte in (*SOURCES[stage], stage):  # in the order of the stages, so that no two wait for each other
        kind = fcntl.LOCK_EX if byte == stage else fcntl.LOCK_SH
        while True:
            try:
                fcntl.lockf(descriptor, kind | fcntl.LOCK_NB, 1, int(byte))
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() - start >= wait_s:
                    _unlock(folder)
                    raise RuntimeError(f"{label} is in use by another process: wait for it or stop it.") from None
                time.sleep(0.1)


def _unlock(folder: Path) -> None:
    descriptor = _held.pop((folder / ".lock").resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


# --- a stage -------------------------------------------------------------------------------------


class Stage:
    """One notebook at work: made by `begin`, ended by `finish`. Files are named without their folder."""

    def __init__(self, stage: str, p: Parameters, dtype: str):
        self.stage, self.p, self.device, self.dtype = stage, p, getattr(p, "device", "cpu"), dtype
        self.run = f"_study_{p.study}" if stage == "07" else p.run
        self.folder = RUNS / self.run  # record, lock, executed copy
        self.target = RESULTS / p.study if stage == "07" else self.folder  # where the outputs go
        self.start, self.inputs, self.outside, self.written = time.monotonic(), {}, {}, {}
        self._checked = {run: _Checked(run) for run in (p.runs if stage == "07" else [p.run])}

    # reading

    def _path(self, file: str, run: str | None = None) -> Path:
        if run is None and PRODUCER.get(file) == self.stage:
            return self.written.get(file, self.target / file)
        if run is None and self.stage == "07":
            raise ValueError(f"notebook 07 reads many runs: name the one whose {file} is meant.")
        if PRODUCER.get(file, self.stage) not in (SOURCES[self.stage] if run is None else list(STAGES)[:-1]):
            raise ValueError(f"notebook {self.stage} cannot read {file}: say in runs.STAGES what it needs.")
        checked = self._checked[run or self.run]
        self.inputs[f"{run}/{file}" if run else file] = checked.hash(file)
        return checked.folder / file

    def read_npz(self, file: str, run: str | None = None) -> dict[str, np.ndarray]:
        """The arrays of an .npz file by name; pickled objects are refused."""
        with np.load(self._path(file, run), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def read_json(self, file: str, run: str | None = None):
        """The content of a JSON file."""
        return json.loads(self._path(file, run).read_text())

    def read_csv(self, file: str, run: str | None = None) -> pd.DataFrame:
        """A table, checked against `SCHEMAS`."""
        return read_table(self._path(file, run), file)

    def read_safetensors(self, file: str, run: str | None = None) -> dict:
        """Tensors by name, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self._path(file, run))

    def read_runs(self, file: str) -> pd.DataFrame:
        """Notebook 07: one table of every run of the study, one below the other, with a first column `run`.

        It goes to data/results/<study>/ too, numbers to 8 digits, and is read back from there: without `runs` in the
        parameters what was committed is read, and gives the same report.
        """
        if self.p.runs and file not in self.written:
            frames = [self.read_csv(file, run).assign(run=run) for run in self.p.runs]
            pooled = check_schema(file, pd.concat(frames, ignore_index=True), pooled=True)
            with self._writing(file) as path:
                pooled.to_csv(path, index=False, na_rep="nan", float_format="%.8g", lineterminator="\n")
        path = self.written.get(file) or self._committed(file)
        return read_table(path, file, pooled=True)

    def _committed(self, file: str) -> Path:
        path = self.target / file
        if not path.is_file():
            raise FileNotFoundError(f"study {self.p.study!r} has no {file} in {self.target}: run the study first.")
        self.record_input(path)
        return path

    def read_about(self) -> pd.DataFrame:
        """Notebook 07: runs.csv anew from every run's description, or as it was committed where no runs are given."""
        if not self.p.runs:
            return read_table(self._committed("runs.csv"))
        rows = []
        for run in self.p.runs:
            model, info = self.read_json("model.json", run), self.read_json("dataset.json", run)
            config, sizes, nan = model["config"] or {}, info["sizes"], float("nan")
            row = {"run": run, "data": info["name"], "training": sizes["train"], "calibration": sizes["calibration"]}
            row |= {"held_out": sizes["test"]} | {key: model[key] for key in ("model", "parameters", "l2", "seed")}
            row |= {"depth": config.get("depth", nan), "width": config.get("d_model", config.get("width", nan))}
            row |= {"heads": config.get("n_heads", nan), "norm": config.get("norm", "")}
            row |= {key: model[key] for key in ("gradient_norm", "threshold", "converged")}
            row |= {f"accuracy_{part.replace('-', '_')}": model["accuracy"][part] for part in ("training", "held-out")}
            row |= made_by(run)
            rows.append(row)
        return check_schema("runs.csv", pd.DataFrame(rows))

    def record_input(self, path: Path | str) -> None:
        """Note a file from outside the run (a user's arrays or weights) with its SHA-256 in run.json."""
        self.outside[Path(path).name] = sha256(path)

    # writing

    @contextmanager
    def _writing(self, file: str):
        """A temporary path for the block to write; OSError with one sentence, and nothing left, if it cannot."""
        if file not in STAGES[self.stage][1] and not (self.stage == "07" and file in PRODUCER):
            raise ValueError(f"{file} is not a file of notebook {self.stage}: add it to STAGES in utils/runs.py.")
        path = self.target / f".{self.stage}.{file}.tmp"
        try:
            with _writable(f"{file} of run {self.run!r}"):
                self.target.mkdir(parents=True, exist_ok=True)
                yield path
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self.written[file] = path

    def write_npz(self, file: str, **arrays: np.ndarray) -> None:
        """Arrays by name (uncompressed; the same arrays give the same bytes)."""
        with self._writing(file) as path, open(path, "wb") as f:
            np.savez(f, **arrays)

    def write_json(self, file: str, value) -> None:
        """Numbers, text, lists and mappings; numpy scalars and arrays become numbers and lists."""
        with self._writing(file) as path:
            path.write_text(_as_json(value))

    def write_csv(self, file: str, frame: pd.DataFrame) -> None:
        """A table; its columns have to be those of `SCHEMAS[file]`, in any order."""
        with self._writing(file) as path:
            write_table(path, file, frame)

    def write_safetensors(self, file: str, tensors: dict) -> None:
        """Tensors by name, copied to the CPU."""
        from safetensors.torch import save

        with self._writing(file) as path:
            path.write_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))

    def finish(self) -> None:
        """Publish every file, then run.json, and give the locks back. Raises ValueError if a file is missing.

        Everything is on the disk before the first rename, so that a full one changes nothing. If the process dies
        between two renames, run.json no longer agrees with the files and the next stage says so. Notebook 07, which
        locks no run, raises ValueError if one has changed since it was read.
        """
        missing = [file for file in STAGES[self.stage][1] if file not in self.written]
        if missing:
            raise ValueError(f"notebook {self.stage} has not written {missing[0]}: write it before finish().")
        entry = {
            "parameters": self.p.model_dump(),
            "versions": versions(self.device),
            "device": self.device,
            "dtype": self.dtype,
            "seed": getattr(self.p, "seed", None),
            "wall_time_s": round(time.monotonic() - self.start, 2),
            "inputs": self.inputs,
            "outside_inputs": self.outside,
            "outputs": {file: sha256(path) for file, path in self.written.items()},
        }
        if self.stage == "07":
            for name, seen in self.inputs.items():
                if sha256(RUNS / name) != seen:
                    raise ValueError(f"{name} has changed while notebook 07 read it: run 07 again.")
        fcntl.lockf(_held[(self.folder / ".lock").resolve()], fcntl.LOCK_EX, 1, 0)  # byte 0: the record
        for leftover in self.folder.glob(".run.json.*.tmp"):
            leftover.unlink(missing_ok=True)  # of a process that was killed: only one at a time writes the record
        stages = record_of(self.run) | {self.stage: entry}
        with _writable(f"run.json of run {self.run!r}"), atomic(self.folder / "run.json") as path:
            path.write_text(_as_json({"run": self.run, "stages": dict(sorted(stages.items()))}))
            for file, written in self.written.items():
                os.replace(written, self.target / file)
        self.written = {}
        _unlock(self.folder)


def begin(stage: str, p: Parameters, wait_s: float | None = None, dtype: str = "float64") -> Stage:
    """Start notebook `stage` on the run `p.run` (07: on the runs `p.runs`): check its inputs, take the locks.

    Waits `wait_s` seconds for another process (default: RUN_LOCK_WAIT of the environment, else 2).
    Raises FileNotFoundError where an earlier notebook has not run, ValueError where an input has changed since or the
    device is not there, RuntimeError where another process keeps a lock; each with one sentence.
    """
    begun = Stage(stage, p, dtype)
    if begun.device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"parameter device is {begun.device!r} and PyTorch sees no GPU here: give cpu.")
    if stage not in ("01", "07") and not begun.folder.is_dir():
        raise FileNotFoundError(f"run {begun.run!r} does not exist in {RUNS}/: run notebook 01 first.")
    wait_s = float(os.environ.get("RUN_LOCK_WAIT", "2")) if wait_s is None else wait_s
    _lock(begun.folder, f"run {begun.run!r}", stage, wait_s)
    try:
        begun._checked = {run: _Checked(run) for run in begun._checked}  # as they are now that the locks are ours
        for file in STAGES[stage][0]:
            begun._path(file)
        if stage == "07":
            for run in p.runs:
                for file, producer in PRODUCER.items():
                    if file.endswith(".csv") and producer != "07":
                        begun._path(file, run)
        for leftover in (*begun.folder.glob(f".{stage}.*.tmp"), *begun.target.glob(f".{stage}.*.tmp")):
            leftover.unlink(missing_ok=True)  # of a process that was killed
    except BaseException:
        _unlock(begun.folder)
        raise
    return begun


def summary(study: str) -> str:
    """The study's findings as a short table of text, and where everything lies."""
    path = RESULTS / study / "findings.csv"
    table = read_table(path).drop(columns=["source", "control"], errors="ignore")
    text = table.to_string(index=False, float_format=lambda v: f"{v:.4g}", na_rep="", max_colwidth=48, justify="left")
    return f"{text}\n\nTable    {path}\nFigures  {FIGURES / study}/\nRuns     {RUNS}/"


if __name__ == "__main__":
    try:
        print(summary(read_study(sys.argv[1]).name))
    except (IndexError, FileNotFoundError):
        sys.exit("there are no findings of that study: run `make study NAME=...` first.")
    except ValueError as error:
        sys.exit(str(error))
