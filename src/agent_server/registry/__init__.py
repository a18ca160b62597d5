"""Finding and loading the user's agents and tools, hot reload, policy, and their MCP servers.

Leans on the domain, the settings and the Agents SDK (whose package is called ``agents``, which
is why this folder is not). Refuses to know runs, plans, storage and HTTP.
"""
