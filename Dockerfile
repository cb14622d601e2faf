# The command pyreft with its server, on a CPU:
#   docker build -t pyreft .
#   docker run --rm pyreft                                    the demo
#   docker run --rm -v "$PWD:/work" pyreft train --data examples.jsonl --output my-adapter
#   docker run --rm -p 8000:8000 -v "$PWD/adapters:/adapters:ro" pyreft \
#       serve --host 0.0.0.0 --api-key SECRET --adapters /adapters
# Wheels come from where pip is told to look: --build-arg PIP_EXTRA_INDEX_URL=... with the CPU build of PyTorch makes
# the image some gigabytes smaller.
FROM python:3.11-slim

ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL

WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt ".[serve,plot]" && rm -rf /src

# models of the hub stay in the volume; what a command writes goes to the working directory
RUN useradd --create-home --uid 1000 pyreft && mkdir /work /models && chown pyreft /work /models
ENV HF_HOME=/models
VOLUME /models
USER pyreft
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["pyreft"]
CMD ["demo"]
