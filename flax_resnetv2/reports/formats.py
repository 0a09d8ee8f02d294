"""Figures as image files and tables as Markdown, for all reports."""

import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=120, layout="constrained")


def encode(figure: Any, kind: Literal["png", "svg"]) -> bytes:
    """Encode a matplotlib figure; equal figures give equal bytes."""
    import matplotlib

    metadata = {"png": ["Software"], "svg": ["Date", "Creator"]}[kind]
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):
        figure.savefig(file, format=kind, metadata=dict.fromkeys(metadata))
    return file.getvalue()


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1
) -> list[str]:
    """Return the lines of a table; columns after ``text_columns`` align right."""
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def one_line(text: str) -> str:
    """Return text without line breaks and borders, for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
