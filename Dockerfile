# docker build -t ai-gateway . && docker run -p 8080:8080 --env-file .env ai-gateway
# Runs on a read-only root as well: docker run --read-only --tmpfs /tmp ...
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# A compiler, and Python's headers where the base keeps them in a package of their own.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev \
 && { python3 -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null \
      || apt-get install -y -qq --no-install-recommends python3-dev; }
# The locked dependencies first: they change less often than the code, and their layer is kept between builds. The
# compiler is told the types of those that the gateway runs with.
COPY requirements/base.txt requirements/native.txt requirements/
RUN python3 -m venv --without-pip /opt/gateway \
 && python3 -m venv /opt/build \
 && /opt/build/bin/pip install --require-hashes --only-binary :all: -r requirements/native.txt -r requirements/base.txt \
 && /opt/build/bin/pip --python /opt/gateway/bin/python install --no-compile --require-hashes --only-binary :all: \
      -r requirements/base.txt
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
# Compiled once, here, to machine code and to bytecode that is never checked again: the root of what runs is read-only.
# Tried at once, with nothing but what the image has: hooks that did not run, and modules of the build's, show here.
RUN HATCH_BUILD_HOOKS_ENABLE=1 /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /tmp/wheels . \
 && /opt/build/bin/pip --python /opt/gateway/bin/python install --no-compile --no-deps --no-index /tmp/wheels/*.whl \
 && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/gateway/lib \
 && /opt/gateway/bin/ai-gateway --version | grep -F '(compiled)' \
 && /opt/gateway/bin/python3 -c 'import gateway.main, gateway.server.worker'

FROM ${BASE}
LABEL org.opencontainers.image.title="ai-gateway" \
      org.opencontainers.image.description="An API gateway for AI services" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.authors="AI Gateway authors"
COPY --from=build /opt/gateway /opt/gateway
ENV PATH=/opt/gateway/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# Where an .env or a gateway.toml may be mounted; nothing is written here.
WORKDIR /app
USER 65532:65532
EXPOSE 8080
STOPSIGNAL SIGTERM
# http.client, since urllib would go through a proxy that the environment names.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
  CMD ["python3", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8080, timeout=2); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["ai-gateway"]
CMD ["serve"]
