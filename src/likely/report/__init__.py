"""One self-contained HTML page about a fitted model."""

from likely.report.document import ReportInput, write_report

__all__ = ["ReportInput", "write_report"]
