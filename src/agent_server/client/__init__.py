"""The Python client: what the HTTP contract offers, as typed calls.

Leans on the domain's words and on httpx2. Refuses to know the server: it speaks to one over the
network and to one inside this process by the same requests.
"""

from agent_server.client.client import AgentServerClient
from agent_server.client.inprocess import AppTransport, in_process
from agent_server.client.runs import RunsClient
from agent_server.client.workflows import WorkflowsClient

__all__ = ["AgentServerClient", "AppTransport", "RunsClient", "WorkflowsClient", "in_process"]
