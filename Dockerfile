# syntax=docker/dockerfile:1
# CPU image:  docker build -t headwater .
# CUDA image: docker build -t headwater:cuda --build-arg DEVICE=cuda .
# scripts/build-rootfs follows these steps where there is no Docker engine: change both.
ARG PYTHON_IMAGE=python:3.12-slim-trixie

FROM ${PYTHON_IMAGE} AS build
ARG DEVICE=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python -m venv /opt/headwater
ENV PATH=/opt/headwater/bin:$PATH
# Slowest and steadiest first, so that a change of the code builds in seconds.
COPY requirements/ requirements/
RUN pip install --no-deps --require-hashes -r requirements/pip.txt
COPY pyproject.toml ./
COPY scripts/install_torch.py scripts/
RUN python scripts/install_torch.py --device "${DEVICE}" --index "${TORCH_INDEX}"
RUN pip install --no-deps --require-hashes -r requirements/torch.txt
COPY . .
RUN { [ "$(uname -m)" != x86_64 ] || python -c 'from app.runner.native import build; build.main()'; } \
    && pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
    && pip install --no-deps /dist/headwater-*.whl

FROM ${PYTHON_IMAGE} AS final
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Headwater" \
      org.opencontainers.image.description="An inference server for trained decoders" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# A numeric owner, so that an orchestrator can tell that it is not root.
RUN groupadd --gid 10001 headwater \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /models --shell /usr/sbin/nologin headwater \
    && install -d -o 10001 -g 10001 /models
COPY --from=build /opt/headwater /opt/headwater
# The root may be read-only: models go to the volume, all else that is written to /tmp.
ENV PATH=/opt/headwater/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HEADWATER_CACHE=/models \
    HF_HOME=/models/huggingface \
    HEADWATER_HOST=0.0.0.0 \
    HEADWATER_PORT=8000 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME ["/models"]
EXPOSE 8000
USER 10001:10001
WORKDIR /models
STOPSIGNAL SIGTERM
# Live, not ready. It answers while a first start fetches the model. With TLS the
# certificate is made out to another name than 127.0.0.1, so it is not looked at.
HEALTHCHECK --interval=10s --timeout=3s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import os, ssl, urllib.request; tls = 'HEADWATER_SSL_CERTFILE' in os.environ; context = ssl.create_default_context(); context.check_hostname = False; context.verify_mode = ssl.CERT_NONE; urllib.request.urlopen(('https' if tls else 'http') + '://127.0.0.1:' + os.environ.get('HEADWATER_PORT', '8000') + '/health', timeout=2, context=context)"]
ENTRYPOINT ["headwater"]
CMD ["serve"]
