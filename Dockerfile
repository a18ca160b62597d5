# syntax=docker/dockerfile:1
# Builds the package and its pinned dependencies with uv, and leaves uv behind.
FROM python:3.12-slim AS build
ENV UV_LINK_MODE=copy \
    UV_COMPILE_BYTECODE=1 \
    UV_PROJECT_ENVIRONMENT=/opt/agent-server
RUN pip install --no-cache-dir uv
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
# The dependencies first: they change less often than the code.
RUN uv sync --no-dev --no-install-project
COPY src ./src
RUN uv sync --no-dev --no-editable

FROM python:3.12-slim AS run
RUN groupadd --system --gid 10001 agent && \
    useradd --system --uid 10001 --gid agent --home-dir /data --no-create-home agent && \
    mkdir -p /data /app && chown agent:agent /data
COPY --from=build /opt/agent-server /opt/agent-server
ENV PATH=/opt/agent-server/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    AGENT_SERVER_ENV=production \
    AGENT_SERVER_HOST=0.0.0.0 \
    AGENT_SERVER_PORT=8000 \
    AGENT_SERVER_DATA_DIR=/data
WORKDIR /app
USER agent
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['AGENT_SERVER_PORT'] + '/livez', timeout=2)"]
# Without AGENT_SERVER_API_KEY, a key is made for this start and printed once.
CMD ["agent-server", "serve", "--generate-key"]
