"""From a goal to its result: plan, check the plan, work it off, revise what fails, answer.

Leans on workflow (a plan is a graph that its interpreter walks), reasoning and actions. Refuses
to know who submitted the goal and how the answer is delivered.
"""
