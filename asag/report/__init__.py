"""Report of a run as a self-contained HTML page."""

from .page import REPORT_FILE, write_report
from .run import Run, RunFolderError, RunRecord

__all__ = ["REPORT_FILE", "Run", "RunFolderError", "RunRecord", "write_report"]
