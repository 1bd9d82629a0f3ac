# A server of one base model and its adapters. EXTRAS picks the device: empty for the CPU, cuda12 or cuda13 for NVIDIA GPUs;
# otel adds traces, remote adapters in S3 and GCS.
#   docker build --build-arg EXTRAS=cuda12,otel --tag chameleon-jax .
#   docker run --gpus all --publish 8000:8000 --volume chameleon-cache:/cache --volume ./adapters:/adapters:ro \
#     --env CHAMELEON_API_KEY chameleon-jax MODEL --adapter-dir /adapters
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG EXTRAS=""
WORKDIR /src
COPY . .
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir ".${EXTRAS:+[${EXTRAS}]}"

FROM python:${PYTHON}-slim
RUN useradd --uid 1000 --create-home chameleon && install --directory --owner chameleon /cache
COPY --from=build /venv /venv
USER chameleon
# weights from the hub, and compiled programs below chameleon_jax/xla
ENV PATH=/venv/bin:$PATH HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache PYTHONUNBUFFERED=1
VOLUME /cache
EXPOSE 8000 8001
# minutes for the first start on a GPU, which compiles every program
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["chameleon-jax", "serve", "--host", "0.0.0.0"]
