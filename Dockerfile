# The image for a machine with an NVIDIA GPU: tunes, verifies and benchmarks. torch's wheels bring CUDA, so the host needs
# the driver and the NVIDIA Container Toolkit alone:
#
#     docker build -t m2gen .
#     docker run --rm --gpus all m2gen info
#     docker run --rm --gpus all -v "$PWD:/work" m2gen tune --spec h100.yaml --db tuning_db
FROM python:3.12-slim-bookworm

# Triton compiles the launchers of kernels with the C compiler that it finds. Debian keeps one version of each, so none is
# pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/m2gen
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch

COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY m2gen ./m2gen
COPY templates ./templates
COPY specs ./specs
COPY tuning_db ./tuning_db
RUN pip install --no-cache-dir -c constraints.txt '.[plot,report,hf]'

RUN useradd --create-home --uid 1000 m2gen && mkdir /work && chown m2gen /work
USER 1000
WORKDIR /work
ENTRYPOINT ["m2gen"]
CMD ["--help"]
