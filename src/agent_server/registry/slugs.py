"""Slugs: the names by which runs and URLs call agents.

Leans on the standard library. Refuses to know what is named.
"""

import re

_RUNS = re.compile(r"[^a-z0-9]+")


def slug(name: str) -> str:
    """``name`` in lower case, every run of other characters one ``-``, none at the ends.

    Empty when nothing is left, which a caller must refuse.
    """
    return _RUNS.sub("-", name.lower()).strip("-")
