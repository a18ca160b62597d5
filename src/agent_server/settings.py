"""Every knob, with its unit and default, in one place.

Read from ``AGENT_SERVER_*`` environment variables (and ``.env``), built once in ``server.py``
or the command line and passed down. Leans on pydantic-settings; refuses to know what the
knobs turn. ``X_FILE`` names a file to read the secret ``X`` from.
"""
