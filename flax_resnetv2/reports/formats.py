"""Figures as image files and tables as Markdown, for all reports."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from flax_resnetv2.system.files import printable

_FAMILIES = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "Noto Sans SC"),
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei"),
    *("PingFang SC", "Hiragino Sans GB", "Yu Gothic", "Malgun Gothic"),
    *("Apple SD Gothic Neo", "Noto Sans Arabic", "Noto Sans Devanagari"),
    *("Noto Sans Thai", "Arial Unicode MS", "Unifont"),
)
"""Fonts for the characters that matplotlib's own font does not have."""


@contextlib.contextmanager
def plain_style() -> Iterator[None]:
    """Draw alike whatever the user's matplotlibrc and MPLBACKEND say.

    A matplotlibrc may ask for LaTeX, which would be started.
    """
    try:
        import matplotlib.style
    except ValueError:  # no such backend; begin again
        for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]
        os.environ["MPLBACKEND"] = "agg"
        import matplotlib.style
    with matplotlib.style.context("default"):
        yield


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=120, layout="constrained")


def encode(figure: Any, kind: Literal["png", "svg"]) -> bytes:
    """Encode a matplotlib figure; equal figures give equal bytes.

    Text stays text in an SVG, so its reader chooses the fonts.
    """
    import matplotlib

    settings = {"svg.hashsalt": "report", "svg.fonttype": "none"}
    metadata = {"png": ["Software"], "svg": ["Date", "Creator"]}[kind]
    file = io.BytesIO()
    with (
        matplotlib.rc_context(settings),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format=kind, metadata=dict.fromkeys(metadata))
    return file.getvalue()


def label(name: str) -> str:
    """Return a name as the text of a figure, in which no formula is read."""
    return printable(name).replace("$", r"\$")


def font_families() -> list[str]:
    """Return the fonts to draw names with: matplotlib's own, then installed ones."""
    from matplotlib.font_manager import get_font_names

    return ["sans-serif", *(name for name in _FAMILIES if name in get_font_names())]


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1
) -> list[str]:
    """Return the lines of a table; columns after ``text_columns`` align right."""
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def one_line(text: str) -> str:
    """Return text without line breaks and borders, for a cell of a Markdown table."""
    return printable(" ".join(text.split())).replace("|", "\\|")
