from __future__ import annotations


def pytest_exception_interact(node, report):
    """A failure is told at once, so that a run which is cut off keeps it."""
    terminal = node.config.get_terminal_writer()
    terminal.line()
    terminal.line(report.longreprtext, flush=True)
