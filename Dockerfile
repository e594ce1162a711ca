# The project on CPUs; runs the demo unless a command is given.
#   docker build -t anomaly .
#   docker run --rm -v "$PWD/runs:/project/runs" anomaly
#   docker run --rm -v "$PWD/runs:/project/runs" -v "$PWD/images:/images:ro" anomaly bash scripts/recipes/own_images.sh /images
# For NVIDIA GPUs: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 -t anomaly . and run --gpus all
FROM python:3.12-slim

RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /project
ENV VIRTUAL_ENV=/project/.venv PATH=/project/.venv/bin:$PATH PYTHONUNBUFFERED=1

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements.txt requirements-medical.txt ./
RUN python -m venv .venv \
    && pip install --no-cache-dir torch torchvision --index-url "$TORCH_INDEX" \
    && pip install --no-cache-dir -r requirements-medical.txt

COPY . .
# `make` installs nothing where this is newer than the requirements.
RUN touch .venv/.installed
CMD ["make", "demo"]
