"""What was measured, for readers: tables for the terminal, reports in one HTML file, leaderboards."""

from crdnd.report._findings import findings
from crdnd.report.comparison import Comparison, load_comparison
from crdnd.report.html import write_comparison, write_report
from crdnd.report.leaderboard import Leaderboard, leaderboard
from crdnd.report.model_card import model_card, published_files, write_model_card
from crdnd.report.table import results_table

__all__ = [
    "Comparison",
    "Leaderboard",
    "findings",
    "leaderboard",
    "load_comparison",
    "model_card",
    "published_files",
    "results_table",
    "write_comparison",
    "write_model_card",
    "write_report",
]
