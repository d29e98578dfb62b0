# glassGPT on a CPU: docker build -t glassgpt . && docker run -it -v glassgpt:/home/glass/run glassgpt
FROM python:3.11-slim
RUN useradd --create-home glass && mkdir -p /home/glass/app /home/glass/run && chown -R glass /home/glass
USER glass
ENV PATH=/home/glass/.venv/bin:$PATH
WORKDIR /home/glass/app
RUN python3 -m venv /home/glass/.venv
COPY --chown=glass requirements.txt .
# the CPU build of torch: PyPI's brings gigabytes of CUDA
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -r requirements.txt
COPY --chown=glass . .
# data/ and out/ of a run lie in this volume
WORKDIR /home/glass/run
CMD ["python", "/home/glass/app/train.py"]
