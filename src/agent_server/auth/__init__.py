"""Who may call: the key, callers of this machine, and the pages that browsers are sent from.

Leans on the domain and the settings. Refuses to know routes and the web framework.
"""
