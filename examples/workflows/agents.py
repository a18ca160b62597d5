"""The agents and tools of the example workflows: an ordinary Agents SDK file.

The tools keep what they do in memory, so that the examples touch nothing outside.
"""

from agents import Agent, function_tool

SOURCES = {
    "batteries": "Batteries store the power of sunny hours for the evening; a set lasts 15 years.",
    "heat pumps": "Heat pumps turn one unit of power into three of heat, less in hard frost.",
    "wind": "Wind blows most in winter, when the sun is weakest; towers need distance.",
}
SEATS = {"flight": 4, "hotel": 0, "car": 7}
ORDERS = [
    {"id": 1, "item": "mug", "total": 17.0, "paid": True},
    {"id": 2, "item": "lamp", "total": 39.0, "paid": False},
    {"id": 3, "item": "plant", "total": 28.5, "paid": True},
]


@function_tool
def refund(customer: str, amount: float) -> str:
    """Pay money back to a customer."""
    return f"{amount:.2f} EUR paid back to {customer}"


@function_tool
def look_up(topic: str) -> str:
    """What the library says about a topic."""
    return SOURCES.get(topic, f"The library has nothing about {topic!r}.")


@function_tool
def word_count(text: str) -> int:
    """How many words a text has."""
    return len(text.split())


@function_tool(failure_error_function=None)
def book(kind: str, trip: str) -> str:
    """Book a seat, a room or a car for a trip; fails where none is left."""
    if SEATS[kind] == 0:
        raise RuntimeError(f"no {kind} is left for {trip}")
    return f"{kind}-{trip}"


@function_tool
def cancel_booking(booking: str) -> str:
    """Cancel what was booked."""
    return f"{booking} is cancelled"


@function_tool
def orders_of_today() -> list[dict[str, object]]:
    """The orders of today: id, item, total and whether it is paid."""
    return list(ORDERS)


support = Agent(name="Support", instructions="Answer customers in two kind sentences.")
researcher = Agent(name="Researcher", instructions="Say in one sentence what matters.")
writer = Agent(name="Writer", instructions="Write short, plain texts.")
