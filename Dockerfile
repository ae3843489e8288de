# SPDX-License-Identifier: Apache-2.0
# trtdet on NVIDIA's TensorRT image: its TensorRT, trtexec and CUDA; Python packages in an environment that sees them.
#
# UNTRIED: this file has been written from NVIDIA's documentation and has not been built. Please report what it does.
#
#     docker build -t trtdet .
#     docker run --rm --gpus all trtdet doctor
#     docker run --rm --gpus all -v "$PWD:/data" -w /data trtdet infer --model d0.engine --input photos --output found
#     docker run --rm --gpus all -v "$PWD/report:/opt/trtdet/build/gpu_report" --entrypoint bash trtdet examples/gpu.sh
#
# The release of the image decides the version of TensorRT: NVIDIA's container release notes list them. An engine runs only with the
# TensorRT that built it.
ARG RELEASE=25.10-py3
FROM nvcr.io/nvidia/tensorrt:${RELEASE}

# libgl1 and libglib2.0-0 are not needed: OpenCV is the headless one.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/trtdet
COPY requirements*.txt ./
# The image's TensorRT stays visible; cuda-python comes from requirements-tensorrt.txt, whose line "tensorrt" would hide it.
RUN python3 -m venv --system-site-packages /opt/venv \
 && grep -v '^tensorrt' requirements-tensorrt.txt > /tmp/requirements-cuda.txt \
 && /opt/venv/bin/pip install --no-cache-dir -r requirements.txt -r /tmp/requirements-cuda.txt -r requirements-tensorflow.txt \
      -r requirements-video.txt 'pytest>=8,<10' 'shapely>=2,<3' 'hypothesis>=6.100,<7' \
 && /opt/venv/bin/python -c 'from importlib.util import find_spec; assert find_spec("tensorrt"), "this image has no TensorRT for Python"'

COPY . .
ENV PATH=/opt/venv/bin:$PATH PYTHON=/opt/venv/bin/python PYTHONPATH=/opt/trtdet ORT_DISABLE_TELEMETRY=1 PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["python", "-m", "trtdet"]
CMD ["doctor"]
