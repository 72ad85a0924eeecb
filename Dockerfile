# docker build -t retinue .
# docker run --gpus all --shm-size 8g -v /data/in1k:/data -v $PWD/outputs:/retinue/outputs -v retinue-weights:/weights \
#     retinue python train.py model=biformer data=imagenet data.root=/data trainer=gpu
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# Triton and torch.compile build their launchers with gcc when they run.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3.12-dev python3.12-venv git make \
    && rm -rf /var/lib/apt/lists/*

# The timm and torch.hub caches lie on the weights volume.
ENV HF_HOME=/weights/huggingface TORCH_HOME=/weights/torch PYTHONUNBUFFERED=1 PATH=/retinue/.venv/bin:$PATH

RUN useradd --create-home retinue && mkdir -p /retinue /data /weights && chown retinue /retinue /data /weights
USER retinue
WORKDIR /retinue

# The dependencies first, in a layer that a change of the code leaves as it is.
COPY --chown=retinue pyproject.toml constraints.txt ./
RUN python3.12 -m venv .venv \
    && python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
        print(*project["dependencies"], *project["optional-dependencies"]["dense"], sep="\n")' > /tmp/dependencies.txt \
    && pip install --no-cache-dir -c constraints.txt -r /tmp/dependencies.txt
COPY --chown=retinue . .
RUN pip install --no-cache-dir --no-deps -e .

RUN mkdir -p outputs
VOLUME ["/data", "/weights", "/retinue/outputs"]
CMD ["python", "train.py"]
