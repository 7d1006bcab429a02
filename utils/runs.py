"""Old name of the modules of `utils.run` on a run's folder."""

from utils.run.files import atomic, sha256
from utils.run.layout import FIGURES, PRODUCER, RESULTS, RUNS, SOURCES
from utils.run.record import made_by, record_of
from utils.run.stage import Stage
from utils.run.start import begin
from utils.run.tables import SCHEMAS, check_schema, read_table, write_table

__all__ = [
    "FIGURES",
    "PRODUCER",
    "RESULTS",
    "RUNS",
    "SCHEMAS",
    "SOURCES",
    "Stage",
    "atomic",
    "begin",
    "check_schema",
    "made_by",
    "read_table",
    "record_of",
    "sha256",
    "write_table",
]
