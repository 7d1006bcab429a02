# Runs a study: notebooks 01 to 06 for each of its runs, then 07 over all of them.
#
#   snakemake --cores 2 --nolock --rerun-incomplete --keep-going --config study=studies/quickstart.yaml
#
# --nolock: a killed Snakemake would leave its lock behind; each notebook locks what it reads and writes instead.
# No notebook needs this file: it only turns the study into papermill calls.
import re
import shlex
import sys

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
# papermill executes a copy; it replaces the last one when it is complete. A failed copy is kept too, as a log.
PAPERMILL = f"""
{ENVIRONMENT}
echo "$(date +%H:%M:%S) start" {{log.notebook:q}} >&2
copy=$(dirname {{log.notebook:q}})/.$$.ipynb
trap 'rm -f "$copy"' EXIT
if {PYTHON} -m papermill {{input.notebook:q}} "$copy" -y {{params.values:q}} --cwd . --no-progress-bar 2> {{log.errors:q}}
then {PYTHON} -m utils.notebooks normalise "$copy" {{log.notebook:q}} 2>> {{log.errors:q}} && : > {{log.errors:q}} && : > {{output.done:q}}
else mv -f "$copy" {{log.notebook:q}} || true
[ -s {{log.errors:q}} ] || echo "stopped without a message: killed, or out of memory." > {{log.errors:q}}
exit 1
fi
"""


def as_yaml(values):
    """One line of YAML that reads back as the same values (1.0e-05, never 1e-05, which YAML takes for text)."""
    return yaml.safe_dump(values, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False).strip()


def errors_of(stage, run):
    return notebooks.executed_path(stage, run).with_suffix(".errors.txt")


def done_of(stage, run):
    """An empty file that only a notebook that succeeded leaves: a failed one keeps the old results, but not this."""
    return f"{notebooks.executed_path(stage, run).with_suffix('.done')}"


def attempts():
    yield from ((stage, run) for run in study.runs for stage in notebooks.NAMES if stage != "07")
    yield "07", study.name


wildcard_constraints:
    run="|".join(map(re.escape, study.runs)),


TABLES = [file for file, stage in runs.PRODUCER.items() if file.endswith(".csv") and stage != "07"]


rule all:  # every file by name: a fresh clone has findings.csv but none of the runs that it came from
    input:
        [f"{runs.RUNS}/{run}/{file}" for run in study.runs for file, stage in runs.PRODUCER.items() if stage != "07"],
        f"{runs.RESULTS}/{study.name}/findings.csv",
        f"{STUDY}/run.json",
        [done_of(stage, run) for stage, run in attempts()],


for stage, (needs, makes) in list(runs.STAGES.items())[:-1]:
    rule:
        name:
            f"notebook_{stage}"
        input:
            *[f"{RUN}/{file}" for file in needs],
            notebook=ancient(f"{notebooks.NOTEBOOKS}/{notebooks.NAMES[stage]}.ipynb"),
        output:
            [update(f"{RUN}/{file}") for file in makes],
            done=done_of(stage, "{run}"),
        log:
            notebook=f"{RUN}/notebooks/{notebooks.NAMES[stage]}.ipynb",
            errors=f"{RUN}/notebooks/{notebooks.NAMES[stage]}.errors.txt",
        params:
            code=code[stage],
            values=lambda wildcards, stage=stage: as_yaml(study.parameters[wildcards.run][stage]),
        resources:
            mem_mb=4000,
            runtime=120,
            gpu=lambda wildcards, stage=stage: int(study.parameters[wildcards.run][stage].get("device") == "cuda"),
        shell:
            PAPERMILL


rule notebook_07:
    input:
        [f"{runs.RUNS}/{run}/{file}" for run in study.runs for file in TABLES],
        notebook=ancient(f"{notebooks.NOTEBOOKS}/{notebooks.NAMES['07']}.ipynb"),
    output:
        update(f"{runs.RESULTS}/{study.name}/findings.csv"),
        update(f"{STUDY}/run.json"),
        done=done_of("07", study.name),
    log:
        notebook=f"{STUDY}/notebooks/{notebooks.NAMES['07']}.ipynb",
        errors=f"{STUDY}/notebooks/{notebooks.NAMES['07']}.errors.txt",
    params:
        code=code["07"],
        values=as_yaml(study.report),
    resources:
        mem_mb=4000,
        runtime=60,
    shell:
        PAPERMILL


onstart:
    for attempt in attempts():
        errors_of(*attempt).unlink(missing_ok=True)


onerror:  # the sentences of the notebooks that failed are the last thing printed
    failed = [(errors_of(*attempt), attempt) for attempt in attempts()]
    failed = [(path, attempt) for path, attempt in failed if path.is_file() and path.stat().st_size]
    sys.exit("\n".join(f"{run}, notebook {stage}: {notebooks.last_error(path)}" for path, (stage, run) in failed))
