"""For the reference: examples in docstrings are code (an extension of Griffe)."""

import re

import griffe


class Doctests(griffe.Extension):
    """Fences what begins with >>> and goes on to the next empty line."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Of every object that has a docstring."""
        if obj.docstring and ">>> " in obj.docstring.value:
            fenced = r"\n```pycon\n\g<0>\n```\n"
            example = r"(?m)^>>> .*(?:\n.+)*"
            obj.docstring.value = re.sub(example, fenced, obj.docstring.value)
