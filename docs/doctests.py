"""Show examples in docstrings as code in the reference (an extension of Griffe)."""

import re

import griffe


class Doctests(griffe.Extension):
    """Fences examples, from >>> to the next empty line, as code blocks."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Fence the examples of one object."""
        if obj.docstring and ">>> " in obj.docstring.value:
            fenced = r"\n```pycon\n\g<0>\n```\n"
            example = r"(?m)^>>> .*(?:\n.+)*"
            obj.docstring.value = re.sub(example, fenced, obj.docstring.value)
