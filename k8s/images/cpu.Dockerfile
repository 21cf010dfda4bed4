# Loraplex on CPUs. From the repository's root:
#   docker build --file k8s/images/cpu.Dockerfile --tag loraplex:cpu .
#   docker build --file k8s/images/cpu.Dockerfile --target demo --tag loraplex:cpu-demo .
# The base image is pinned by digest; to renew it: docker buildx imagetools inspect python:3.11-slim-bookworm
FROM python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
# Debian 12's own versions, security updates included; the compiler is for our LoRA kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY cpu.lock ./
# torch's CPU build is on PyTorch's index; whichever index a file comes from, it has to be the one whose hash the lock has.
RUN python -m pip install --no-deps --require-hashes --requirement cpu.lock \
    --extra-index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE ./
COPY engine engine
COPY loadtest loadtest
RUN python -m pip install --no-deps --no-build-isolation .

FROM python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b AS runtime
LABEL org.opencontainers.image.title="loraplex" org.opencontainers.image.licenses="Apache-2.0"
# As above; vLLM's CPU build and our kernels load these two.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/loraplex --shell /usr/sbin/nologin loraplex \
    && install --directory --owner=10001 --group=10001 /var/lib/loraplex /models /registry
# Into the system's own prefix: also a login shell, as KubeRay starts one, finds `loraplex` and `ray`.
COPY --from=build /usr/local /usr/local
# What is written goes to /var/lib/loraplex and /tmp; the rest of the image may be read-only.
ENV HOME=/var/lib/loraplex \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
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

# The demo's base model, made as `make model` makes it.
FROM build AS model
COPY examples/prepare_model.py ./
RUN python prepare_model.py /models/smollm2-135m-instruct

# With a small base model and the demo's adapters inside: no volume, no download.
FROM runtime AS demo
# Safetensors are written for their owner alone.
COPY --from=model --chown=10001:10001 /models/smollm2-135m-instruct /models/smollm2-135m-instruct
ENV LORAPLEX_MODEL=/models/smollm2-135m-instruct
COPY examples/support /usr/local/share/loraplex/examples/support
COPY examples/legal /usr/local/share/loraplex/examples/legal
COPY examples/code /usr/local/share/loraplex/examples/code

# What is built without --target.
FROM runtime
