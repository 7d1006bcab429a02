"""Executed notebooks and committed pages.

python -m workflow normalise IN OUT      an executed copy without run-to-run noise
python -m workflow merge STUDY.yaml      a study's outputs into notebooks/, findings into docs/
python -m workflow render STUDY.yaml     its first run, executed, into notebooks/rendered/
python -m workflow summary STUDY.yaml    print its findings
python -m workflow dictionary            the columns of the result files into data/README.md
python -m workflow check                 the rules for notebooks, one line for each breach
"""

from __future__ import annotations

import sys

from utils.report.networks import networks_table
from utils.run.study import read_study
from workflow import checks, execution, pages


def main(arguments: list[str]) -> None:
    """The command line described at the top. Exits with one sentence where something is wrong."""
    try:
        match arguments:
            case ["normalise", executed, target]:
                execution.normalise(executed, target)
            case ["merge", path]:
                execution.merge_study(path)
                table = pages.findings_table(read_study(path).name)
                pages.fill("docs/findings.md", "findings", table)
                pages.fill("README.md", "networks", networks_table())
            case ["render", path]:
                execution.render(read_study(path))
            case ["summary", path]:
                print(pages.summary(read_study(path).name))
            case ["dictionary"]:
                pages.fill("data/README.md", "dictionary", pages.dictionary())
            case ["check"]:
                check()
            case _:
                sys.exit((__doc__ or "").rstrip())
    except OSError as error:
        named = error.filename and f"{error.filename}: {error.strerror}; name a file that is there."
        sys.exit(named or str(error))
    except ValueError as error:
        sys.exit(str(error))


def check() -> None:
    """Print every breach of the rules by a committed notebook, and exit with 1 if there is one."""
    notebooks = sorted(execution.NOTEBOOKS.glob("*.ipynb"))
    if not notebooks:
        sys.exit(
            f"There is no notebook in {execution.NOTEBOOKS}/: start in the repository's folder."
        )
    said = [
        f"{notebook}: {problem}" for notebook in notebooks for problem in checks.problems(notebook)
    ]
    if said:
        sys.exit("\n".join(said))


if __name__ == "__main__":
    main(sys.argv[1:])
