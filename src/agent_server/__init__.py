"""Agent Server: durable services from agents written with the OpenAI Agents SDK."""

__version__ = "0.1.0"
