# The command rush on the CPU. In the root of the repository:
#   docker build -t rush .
#   mkdir -p runs
#   docker run --rm --user "$(id -u)" -e HOME=/tmp -v "$PWD/runs:/app/runs" rush run digits
FROM python:3.12-slim

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
# The CPU build of torch. The wheel on PyPI would bring gigabytes of CUDA packages.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /source
COPY constraints.txt ./
RUN pip install -c constraints.txt torch --index-url "$TORCH_INDEX"
COPY LICENSE README.md pyproject.toml ./
COPY src/rush src/rush
COPY results/cifar10-small/model results/cifar10-small/model
RUN pip install -c constraints.txt .

RUN useradd --create-home --uid 1000 rush && mkdir /app && chown rush /app
USER rush
WORKDIR /app
ENTRYPOINT ["rush"]
CMD ["--help"]
