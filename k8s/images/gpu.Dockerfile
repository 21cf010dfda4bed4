# Loraplex on NVIDIA GPUs. From the repository's root:
#   docker build --file k8s/images/gpu.Dockerfile --tag loraplex:gpu .
# CUDA comes with the lock's packages, the driver from the node (NVIDIA's container toolkit), so no CUDA base image is needed.
# The base image is pinned by digest; to renew it: docker buildx imagetools inspect python:3.11-slim-bookworm
FROM python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY gpu.lock ./
RUN python -m pip install --no-deps --require-hashes --requirement gpu.lock
COPY pyproject.toml README.md LICENSE ./
COPY engine engine
COPY loadtest loadtest
RUN python -m pip install --no-deps --no-build-isolation .

FROM python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b AS runtime
LABEL org.opencontainers.image.title="loraplex" org.opencontainers.image.licenses="Apache-2.0"
# Debian 12's own versions, security updates included; Triton compiles its kernels' launchers with gcc.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/loraplex --shell /usr/sbin/nologin loraplex \
    && install --directory --owner=10001 --group=10001 /var/lib/loraplex /models /registry
# Into the system's own prefix: also a login shell, as KubeRay starts one, finds `loraplex` and `ray`.
COPY --from=build /usr/local /usr/local
# What is written goes to /var/lib/loraplex (compiled kernels too, so keep it) and /tmp; the rest may be read-only.
ENV HOME=/var/lib/loraplex \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LORAPLEX_MODEL=/models/base \
    LORAPLEX_REGISTRY=/registry \
    LORAPLEX_CACHE=/var/lib/loraplex/cache
WORKDIR /var/lib/loraplex
USER 10001:10001
EXPOSE 50051 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["loraplex", "health", "--http", "127.0.0.1:9090", "--http", "127.0.0.1:9091"]
ENTRYPOINT ["loraplex"]
CMD ["serve"]
