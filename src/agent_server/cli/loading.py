"""Loading the server quickly: most of a start is imports.

Leans on the garbage collector's switches. Refuses to know what is loaded.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Around imports: nothing they make is garbage, so the collector looks for none. It leaves
    them alone from then on, too, which keeps its pauses short while serving."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
