"""For the site's reference: Sphinx's roles in docstrings, which editors understand, become code."""

import re

import griffe


class Roles(griffe.Extension):
    """``:func:`~diffit.models.build` `` becomes ``build``."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", obj.docstring.value)
