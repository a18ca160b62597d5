"""Agent Server: durable services from agents written with the OpenAI Agents SDK.

Leans on nothing. A user's file is called ``agents.py`` as often as not, and so is the SDK's
package: whoever imports this one first gets the SDK, wherever Python was started.
"""

import os
import sys

__version__ = "0.1.0"


def _let_the_sdk_be_found() -> None:
    """Move folders with an ``agents`` of the user's behind the installed packages.

    ``python -m``, ``python main.py`` and Gunicorn put the working folder in front of everything.
    """

    def hides_the_sdk(entry: str) -> bool:
        here = os.path.join(entry or os.curdir, "agents")
        return (os.path.isfile(here + ".py") or os.path.isdir(here)) and not os.path.isfile(
            os.path.join(here, "run_context.py")
        )

    hiding = [entry for entry in sys.path if hides_the_sdk(entry)]
    if hiding:
        sys.path[:] = [entry for entry in sys.path if entry not in hiding] + hiding


_let_the_sdk_be_found()
