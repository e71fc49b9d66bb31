# What README.md says under Install. How to build and run it: docs/machines.md.
FROM python:3.12-slim
COPY . /spiralrope
WORKDIR /spiralrope
RUN pip install --no-cache-dir .
WORKDIR /
ENTRYPOINT ["spiralrope"]
