# Stages without a GPU: configure, dataset, reward, evaluate, publish; the janitor and the chain's next submission.
#
# BASE needs python3 (3.11) with the venv module. Nothing but the interpreter and libc of BASE is used,
# so a Debian slim python image and a bare debootstrap tree both do.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
COPY requirements/cpu.txt /build/requirements.txt
# --no-deps: what the lock does not name is not installed. The image gets neither pip nor setuptools.
RUN python3 -m venv /build/tools && /build/tools/bin/python -m pip install setuptools==84.2.1
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/python -m pip install --no-compile --no-deps -r /build/requirements.txt \
 && /opt/venv/bin/python -m pip check \
 && /opt/venv/bin/python -m pip uninstall --yes --quiet pip setuptools
COPY images/prune.py images/check.py /build/
# Bytecode of what stages import and of nothing else: half of a full compilation's size, and a read-only root
# could not write it later.
RUN /opt/venv/bin/python /build/prune.py \
 && HOME=/tmp /opt/venv/bin/python /build/check.py cpu --libraries
# The package apart from what it needs: a change of code is a layer of kilobytes.
COPY pyproject.toml README.md LICENSE /build/src/
COPY pipeline /build/src/pipeline
COPY components /build/src/components
RUN /build/tools/bin/python -m pip install --no-deps --no-build-isolation --target /opt/grpo /build/src

FROM ${BASE}
ARG VERSION=0.0.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
ARG BASE
LABEL org.opencontainers.image.title="grpo-pipeline cpu" \
      org.opencontainers.image.description="GRPO pipeline stages that need no GPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE}"
# /work, /cache and /tmp are the only writable paths; mount a volume on each to run with a read-only root.
RUN groupadd --gid 1000 grpo \
 && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /work --shell /usr/sbin/nologin grpo \
 && install -d -o 1000 -g 1000 -m 0775 /work /cache
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/grpo /opt/grpo
COPY images/check.py /opt/check.py
ENV PATH=/opt/venv/bin:/opt/grpo/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/opt/grpo \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    GRPO_IMAGE=cpu \
    HOME=/work \
    TMPDIR=/tmp \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /work
USER 1000:1000
VOLUME ["/work", "/cache", "/tmp"]
RUN ["python3", "/opt/check.py", "cpu"]
CMD ["python3", "/opt/check.py", "cpu"]
