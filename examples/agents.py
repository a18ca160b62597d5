"""Two agents with a handoff, and two function tools: an ordinary Agents SDK file.

Nothing in it knows the server. Serve it with

    AGENT_SERVER_AGENTS=examples/agents.py agent-server serve

and ask it something:

    agent-server run --agent front-desk "What does a basket of 3 mugs and 2 lamps cost?"
"""

from agents import Agent, function_tool

PRICES = {"mug": 8.50, "lamp": 39.00, "plant": 14.25}


@function_tool
def list_products() -> dict[str, float]:
    """The products on sale and their prices in euro."""
    return PRICES


@function_tool
def price_of(product: str, quantity: int) -> str:
    """What a number of one product costs.

    Args:
        product: The product's name, in the singular.
        quantity: How many.
    """
    if product not in PRICES:
        return f"We do not sell {product!r}. On sale: {', '.join(sorted(PRICES))}."
    return f"{quantity} x {product} = {PRICES[product] * quantity:.2f} EUR"


sales_clerk = Agent(
    name="Sales clerk",
    handoff_description="Knows the products and works out prices.",
    instructions="Answer questions about products and prices. Use the tools; never guess a price.",
    tools=[list_products, price_of],
)

front_desk = Agent(
    name="Front desk",
    handoff_description="Greets visitors and passes them on.",
    instructions="Greet the visitor in one sentence. Hand questions about products to the clerk.",
    handoffs=[sales_clerk],
)
