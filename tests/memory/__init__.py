import pytest

pytest.register_assert_rewrite("agent_server.testing.memory_store")
