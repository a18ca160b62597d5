"""The shared words: ids, runs, tasks, steps, plans, workflows, events and the error tree.

Leans on Pydantic alone. Refuses to know any other package of ours: everything imports
this folder, and this folder imports nobody.
"""
