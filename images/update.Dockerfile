# update: the trainer, on torch as its project ships it, with DeepSpeed's operations compiled here and not at pod start.
#
# BUILD_BASE has the compiler (and nvcc, for CUDA operations); BASE is what runs. Both hold the same torch.
# A CPU image, for kind:  BASE and BUILD_BASE = a Debian with python3, python3-venv and, to build, a C++ compiler;
# TORCH="torch==2.13.0", TORCH_BACKEND=cpu, OPS="DS_BUILD_SHM_COMM=1", ACCELERATOR=cpu.
ARG BASE=docker.io/pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
ARG BUILD_BASE=docker.io/pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel

FROM ${BUILD_BASE} AS build
ARG TORCH=""
# A backend that uv knows (cpu, cu130): it finds torch's builds for that. Blank: pip, from where pip is configured to look.
ARG TORCH_BACKEND=""
ARG OPS="DS_BUILD_FUSED_ADAM=1 DS_BUILD_CPU_ADAM=1 DS_BUILD_UTILS=1"
ARG ACCELERATOR=cuda
# Hopper, Ada and Ampere; every further architecture adds minutes.
ARG CUDA_ARCHITECTURES="8.0;8.9;9.0"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
COPY requirements/update.txt /build/requirements.txt
COPY requirements/tools.txt /build/tools.txt
COPY images/prune.py images/check.py /build/
# The environment sees the base's torch; it gets its own only where the base has none.
RUN python3 -m venv --system-site-packages /opt/venv \
 && /opt/venv/bin/python -m pip install --no-deps -r /build/tools.txt \
 && if [ -n "${TORCH}" ] && [ -n "${TORCH_BACKEND}" ]; then \
      VIRTUAL_ENV=/opt/venv /opt/venv/bin/uv pip install --torch-backend "${TORCH_BACKEND}" "${TORCH}"; \
    elif [ -n "${TORCH}" ]; then \
      /opt/venv/bin/python -m pip install --no-compile "${TORCH}"; \
    fi \
 && /opt/venv/bin/python -m pip uninstall --yes uv \
 && grep -v '^deepspeed==' /build/requirements.txt > /build/others.txt \
 && /opt/venv/bin/python -m pip install --no-compile --no-deps -r /build/others.txt
RUN grep '^deepspeed==' /build/requirements.txt > /build/deepspeed.txt \
 && export PATH=/opt/venv/bin:${PATH} TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" DS_ACCELERATOR="${ACCELERATOR}" \
 && env ${OPS} /opt/venv/bin/python -m pip install --no-compile --no-deps --no-build-isolation \
      --no-binary deepspeed -r /build/deepspeed.txt \
 && /opt/venv/bin/python /build/prune.py
COPY pyproject.toml README.md LICENSE /build/src/
COPY pipeline /build/src/pipeline
COPY components /build/src/components
RUN /opt/venv/bin/python -m pip install --no-deps --no-build-isolation --target /opt/grpo /build/src \
 && HOME=/tmp /opt/venv/bin/python /build/check.py update --libraries

FROM ${BASE}
ARG VERSION=0.0.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
ARG ACCELERATOR=cuda
ARG BASE
LABEL org.opencontainers.image.title="grpo-pipeline update" \
      org.opencontainers.image.description="GRPO update stage: torch and DeepSpeed" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE}"
USER root
# Some bases bring a user 1000 of their own.
RUN (getent group 1000 || groupadd --gid 1000 grpo) \
 && (getent passwd 1000 || useradd --uid 1000 --gid 1000 --no-create-home --home-dir /work --shell /usr/sbin/nologin grpo) \
 && install -d -o 1000 -g 1000 -m 0775 /work /cache
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/grpo /opt/grpo
COPY images/check.py /opt/check.py
ENV PATH=/opt/venv/bin:/opt/grpo/bin:${PATH} \
    PYTHONPATH=/opt/grpo \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DS_ACCELERATOR=${ACCELERATOR} \
    HOME=/work \
    TMPDIR=/tmp \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    TORCH_EXTENSIONS_DIR=/cache/torch_extensions \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /work
USER 1000:1000
VOLUME ["/work", "/cache", "/tmp"]
ENTRYPOINT []
RUN ["python3", "/opt/check.py", "update"]
CMD ["python3", "/opt/check.py", "update"]
