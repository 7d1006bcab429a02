"""Old name of the modules of `workflow`."""

from workflow.checks import LINK, problems
from workflow.execution import NAMES, executed_path, read, write
from workflow.pages import dictionary, fill, findings_table

__all__ = [
    "LINK",
    "NAMES",
    "dictionary",
    "executed_path",
    "fill",
    "findings_table",
    "problems",
    "read",
    "write",
]
