# Atelier's server. Two images from one file:
#   docker build -t atelier .                                                  with CUDA (torch's own wheels bring it)
#   docker build -t atelier:cpu --build-arg DEVICE=cpu --build-arg TORCH_INDEX=URL .
# TORCH_INDEX is a package index that has torch built for CPUs alone. docs/operations.md says how to run either.
ARG BASE=debian:12.15-slim
ARG DEVICE=cuda

# The base's own Python: its security updates are Debian's, and it comes without pip.
FROM ${BASE} AS python
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3=3.11.2-1+b1 \
 && rm -rf /var/lib/apt/lists/*

# ---- what the image is made with: none of it reaches the image
FROM python AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3-venv=3.11.2-1+b1 \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/atelier
WORKDIR /src

FROM build AS torch-cuda

FROM build AS torch-cpu
ARG TORCH_INDEX
COPY constraints.txt /src/
RUN test -n "${TORCH_INDEX}" || { echo "DEVICE=cpu needs --build-arg TORCH_INDEX=URL" >&2; exit 1; } \
 && /opt/pip/bin/pip --python /opt/atelier/bin/python install --no-deps --constraint constraints.txt \
      --index-url "${TORCH_INDEX}" torch

# The dependencies change seldom and are large: a layer of their own, before any source.
# hadolint ignore=DL3006
FROM torch-${DEVICE} AS dependencies
ARG EXTRAS=server
COPY pyproject.toml constraints.txt /src/
RUN /opt/atelier/bin/python -c "import tomllib; \
      project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
      extras = project['optional-dependencies']; \
      print(*project['dependencies'], *(need for name in '${EXTRAS}'.split() for need in extras[name]), sep='\n')" \
      > requirements.txt \
 && /opt/pip/bin/pip --python /opt/atelier/bin/python install --constraint constraints.txt --requirement requirements.txt

FROM build AS application
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE /src/
COPY client /src/client
COPY server /src/server
RUN PIP_CONSTRAINT=constraints.txt /opt/pip/bin/pip --python /opt/atelier/bin/python install --no-deps --target /app .

# ---- the image
FROM python AS image
RUN groupadd --system --gid 65532 atelier \
 && useradd --system --uid 65532 --gid atelier --home-dir /data --no-create-home --shell /usr/sbin/nologin atelier \
 && install --directory --owner atelier --group atelier --mode 0750 /data
COPY --from=dependencies /opt/atelier /opt/atelier
COPY --from=application /app /app
# Written to: /data (adapters, trainings, what a hub sends) and /tmp. The rest may be mounted read-only.
ENV PATH=/app/bin:/opt/atelier/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_WAIT_POLICY=PASSIVE \
    HF_HOME=/data/hub \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    ATELIER_HOST=0.0.0.0 \
    ATELIER_DATA_DIR=/data
USER 65532:65532
WORKDIR /data
VOLUME ["/data"]
EXPOSE 50051 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=300s --interval=30s --timeout=10s CMD ["python", "-m", "atelier_server.rpc.probe", "/data"]
ENTRYPOINT ["python", "-m", "atelier_server"]
