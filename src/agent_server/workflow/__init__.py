"""Workflows: what an expression means, whether a graph can run, and the walk that runs it.

Leans on the domain's definition, on the contract of durable code and on the handlers of agents
and actions. Refuses to know plans (they become definitions above) and HTTP.
"""
