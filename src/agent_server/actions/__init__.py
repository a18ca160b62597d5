"""What happens outside when something happened inside: triggers, and handlers that touch the world.

Leans on the contract of durable code, so that each firing happens once. Refuses to know plans,
workflows and models: it is lent what it needs of them.
"""
