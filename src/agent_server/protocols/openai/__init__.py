"""OpenAI's API over our agents: any client that speaks it can use an agent as if it were a model.

Leans on ``api`` for routes and streams, and on its ports. Refuses to know how a run works: it
turns OpenAI's requests into runs, and the events of runs into OpenAI's objects and events.
"""
