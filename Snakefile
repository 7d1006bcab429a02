# Runs a study: notebooks 01 to 06 for each of its runs, then 07 over all of them.
#
#   snakemake --cores 2 --nolock --rerun-incomplete --keep-going --config study=studies/quickstart.yaml
#
# --nolock: a killed Snakemake would leave its lock behind; each notebook locks what it reads and writes instead.
# No notebook needs this file: it only turns the study into papermill calls.
import re
import shlex
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, workflow.basedir)
from utils import notebooks, params, runs

try:  # the whole study is checked before anything runs
    study = params.read_study(config.get("study", "studies/quickstart.yaml"))
    code = {stage: notebooks.code_hash(notebooks.NOTEBOOKS / f"{name}.ipynb") for stage, name in notebooks.NAMES.items()}
except ValueError as error:
    sys.exit(f"{error}")

RUN, STUDY = f"{runs.RUNS}/{{run}}", f"{runs.RUNS}/_study_{study.name}"
ENVIRONMENT = (
    "export RUN_LOCK_WAIT=900 PYTHONHASHSEED=0 MPLBACKEND=module://matplotlib_inline.backend_inline "
    "JUPYTER_PREFER_ENV_PATH=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYDEVD_DISABLE_FILE_VALIDATION=1"
)
PYTHON = shlex.quote(sys.executable)
# papermill executes a copy; it replaces the last one when it is complete. A failed copy is kept too, as a log. Neither
# results nor notebooks are outputs in Snakemake's sense, which would delete them before a job or put old ones back after
# a failed one: the notebook publishes its files whole by itself, and only the marker `done` says that it ended, with their
# checksums: Snakemake asks the content of a small file, not its time alone, whether what comes after is out of date.
# Kernels that start together may choose one port: one of them dies before its first cell, and is started again.
PAPERMILL = f"""
{ENVIRONMENT}
echo "$(date +%H:%M:%S) start" {{params.notebook:q}} >&2
folder=$(dirname {{params.notebook:q}}) name=$(basename {{params.notebook:q}} .ipynb)
for old in "$folder/.$name".*.ipynb
do kill -0 "$(basename "$old" .ipynb | cut -d. -f3)" 2> /dev/null || rm -f "$old"
done
copy="$folder/.$name.$$.ipynb"
trap 'rm -f "$copy"' EXIT
execute() ({PYTHON} -m papermill {{input.notebook:q}} "$copy" -y {{params.values:q}} --cwd . --no-progress-bar --log-output 2> {{params.errors:q}})
if execute || (grep -q "^zmq.error.ZMQError: Address already in use" {{params.errors:q}} && execute)
then {PYTHON} -m utils.notebooks normalise "$copy" {{params.notebook:q}} 2>> {{params.errors:q}} && sha256sum {{params.files:q}} > {{output:q}} && : > {{params.errors:q}}
else mv -f "$copy" {{params.notebook:q}} || true
[ -s {{params.errors:q}} ] || echo "stopped without a message: killed, or out of memory." > {{params.errors:q}}
exit 1
fi
"""


def as_yaml(values):
    """One line of YAML that reads back as the same values (1.0e-05, never 1e-05, which YAML takes for text)."""
    return yaml.safe_dump(values, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False).strip()


def errors_of(stage, run):
    return notebooks.executed_path(stage, run).with_suffix(".errors.txt")


def done_of(stage, run):
    """A file that only a notebook that succeeded leaves: a failed one keeps the old results, but not this."""
    return f"{notebooks.executed_path(stage, run).with_suffix('.done')}"


def files_of(stage, run):
    """What the notebook publishes: a fresh clone has findings.csv, but none of the runs that it came from."""
    if stage == "07":
        return [f"{STUDY}/run.json", *(f"{runs.RESULTS}/{run}/{file}" for file in runs.STAGES[stage][1])]
    return [f"{runs.RUNS}/{run}/{file}" for file in ("run.json", *runs.STAGES[stage][1])]


def attempts():
    yield from ((stage, run) for run in study.runs for stage in notebooks.NAMES if stage != "07")
    yield "07", study.name


started = time.time()
for attempt in attempts():  # a marker whose files have gone marks nothing
    if not all(Path(file).is_file() for file in files_of(*attempt)):
        Path(done_of(*attempt)).unlink(missing_ok=True)


wildcard_constraints:
    run="|".join(map(re.escape, study.runs)),


rule all:
    input:
        [done_of(stage, run) for stage, run in attempts()],


for stage in list(runs.STAGES)[:-1]:
    rule:
        name:
            f"notebook_{stage}"
        input:
            *[done_of(source, "{run}") for source in runs.SOURCES[stage]],
            notebook=ancient(f"{notebooks.NOTEBOOKS}/{notebooks.NAMES[stage]}.ipynb"),
        output:
            done_of(stage, "{run}"),
        params:
            code=code[stage],
            values=lambda wildcards, stage=stage: as_yaml(study.parameters[wildcards.run][stage]),
            notebook=f"{RUN}/notebooks/{notebooks.NAMES[stage]}.ipynb",
            errors=f"{RUN}/notebooks/{notebooks.NAMES[stage]}.errors.txt",
            files=lambda wildcards, stage=stage: files_of(stage, wildcards.run)[1:],
        resources:
            mem_mb=4000,
            runtime=120,
            gpu=lambda wildcards, stage=stage: int(study.parameters[wildcards.run][stage].get("device") == "cuda"),
        shell:
            PAPERMILL


rule notebook_07:
    input:
        [done_of(stage, run) for stage, run in attempts() if stage != "07"],
        notebook=ancient(f"{notebooks.NOTEBOOKS}/{notebooks.NAMES['07']}.ipynb"),
    output:
        done_of("07", study.name),
    params:
        code=code["07"],
        values=as_yaml(study.report),
        notebook=f"{STUDY}/notebooks/{notebooks.NAMES['07']}.ipynb",
        errors=f"{STUDY}/notebooks/{notebooks.NAMES['07']}.errors.txt",
        files=files_of("07", study.name)[1:],
    resources:
        mem_mb=4000,
        runtime=60,
    shell:
        PAPERMILL


onerror:  # the sentences of the notebooks that failed are the last thing printed
    failed = [(errors_of(*attempt), attempt) for attempt in attempts()]
    failed = [(path, attempt) for path, attempt in failed if path.is_file() and path.stat().st_size]
    failed = [(path, attempt) for path, attempt in failed if path.stat().st_mtime >= started]
    sys.exit("\n".join(f"{run}, notebook {stage}: {notebooks.last_error(path)}" for path, (stage, run) in failed))
