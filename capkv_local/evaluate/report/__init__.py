"""Reports on the records of a run: tables, figures and one page that has it all."""

from capkv_local.evaluate.report.figures import draw_figures
from capkv_local.evaluate.report.page import render_page, write_report
from capkv_local.evaluate.report.table import make_console, markdown, print_tables

__all__ = [
    "draw_figures",
    "make_console",
    "markdown",
    "print_tables",
    "render_page",
    "write_report",
]
