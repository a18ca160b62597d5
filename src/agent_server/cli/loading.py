"""Loading the server quickly: most of a start is imports.

Leans on the garbage collector's switches. Refuses to know what is loaded.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

THRESHOLDS: Final = (20_000, 20, 20)
"""New objects after which the collector looks, and how rarely at older ones: most of ours go by
themselves, and at Python's own 700 it takes a tenth of the CPU of a busy server."""


@contextmanager
def loading() -> Iterator[None]:
    """Around imports: nothing they make is garbage, so the collector looks for none. It leaves
    them alone from then on, too, which keeps its pauses short while serving."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(*THRESHOLDS)
        gc.enable()
