# docker build -t gpt_lightning . && docker run --gpus all -v "$PWD:/work" gpt_lightning gpt-lightning-train
FROM python:3.12-slim

# torch.compile (device.compile=true) builds its kernels with a compiler; any version of it will do
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY . .
RUN pip install --no-cache-dir -c constraints.txt ".[hf,demo]"

# runs and the cache belong to whoever mounts /work, not to root
RUN useradd --create-home --uid 1000 user && mkdir /work && chown 1000 /work
USER 1000
WORKDIR /work
ENV GPT_LIGHTNING_CACHE=/work/.cache
CMD ["gpt-lightning-train", "--help"]
