"""The HTTP door: REST and event streams under ``/api/v1``, probes, metrics, documentation.

Leans on ``auth`` and on the ports that ``server.py`` fills. Refuses to know planning, workflows,
reasoning and agents: it submits by name and reads events.
"""
