.PHONY: check format test clients chaos bench serve pins docs

SOURCES = src tests scripts benchmarks examples main.py

check: ## What CI runs
	.ci/run

format: ## Rewrite the code in the project's style
	uv run isort --quiet $(SOURCES)
	uv run black --quiet $(SOURCES)
	uv run ruff check --fix $(SOURCES)

test: ## The fast tests
	uv run pytest

clients: ## Install the clients of others that tests/clients speaks with: LangChain, and npm's
	uv sync --quiet --group clients
	uv run python -m tests.clients.node_project

chaos: ## Every fault of the matrix, the long crash loops too; the report is chaos-report.md
	uv run python -m tests.durability.matrix

bench: ## CPU and memory against a bare app, as ratios
	uv run python -m benchmarks

serve: ## The development server, with reload
	uv run python main.py

pins: ## Take the newest versions of every dependency
	uv run python scripts/refresh_pins.py

docs: ## Write the generated pages anew
	uv run python scripts/write_docs.py
