"""The report of a training: one HTML page that needs nothing else."""

from .page import REPORT_FILE, write_report
from .run import Run, RunFolderError, RunRecord

__all__ = ["REPORT_FILE", "Run", "RunFolderError", "RunRecord", "write_report"]
