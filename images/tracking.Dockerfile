# The MLflow server with what its official image lacks: the PostgreSQL driver and the S3 client.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
COPY requirements/tracking.txt /build/requirements.txt
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/python -m pip install --no-compile --no-deps -r /build/requirements.txt \
 && /opt/venv/bin/python -m pip check \
 && /opt/venv/bin/python -m pip uninstall --yes --quiet pip setuptools
COPY images/prune.py images/check.py /build/
RUN /opt/venv/bin/python /build/prune.py \
 && HOME=/tmp /opt/venv/bin/python /build/check.py tracking --libraries

FROM ${BASE}
ARG VERSION=0.0.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
ARG BASE
LABEL org.opencontainers.image.title="grpo-pipeline tracking" \
      org.opencontainers.image.description="MLflow server for the GRPO pipeline" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE}"
RUN groupadd --gid 1000 grpo \
 && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /work --shell /usr/sbin/nologin grpo \
 && install -d -o 1000 -g 1000 -m 0775 /work /cache
COPY --from=build /opt/venv /opt/venv
COPY images/check.py /opt/check.py
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/work \
    TMPDIR=/tmp \
    XDG_CACHE_HOME=/cache \
    MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /work
USER 1000:1000
VOLUME ["/work", "/cache", "/tmp"]
EXPOSE 5000
RUN ["python3", "/opt/check.py", "tracking"]
CMD ["mlflow", "server", "--host=0.0.0.0", "--port=5000"]
