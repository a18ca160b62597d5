"""How one task is solved: the approaches, the rule that chooses one, and the tasks that use them.

Leans on inference (agents whose model and tools are ledgered) and on the registry. Refuses to
know plans and workflows: it is given one task, with what came before it as text.
"""
