"""report.html of an experiment, one page that holds everything it shows. It reads an experiment's files alone."""

from m2d.report.page import write_report

__all__ = ["write_report"]
