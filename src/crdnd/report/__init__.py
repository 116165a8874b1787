"""What was measured, for readers: a table for the terminal and a report in one HTML file."""

from crdnd.report._findings import findings
from crdnd.report.html import write_report
from crdnd.report.table import results_table

__all__ = ["findings", "results_table", "write_report"]
