"""The store of long-term memory, on both databases, and what holds of ours alone."""

from agent_server.testing.memory_store import MemoryStoreContract


class TestStore(MemoryStoreContract):
    pass
