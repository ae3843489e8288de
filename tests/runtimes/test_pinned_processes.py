# SPDX-License-Identifier: Apache-2.0
"""Batches that processes fill in pinned memory, on a GPU (`pytest -m gpu`)."""

import gc

import gpu_engines
import numpy as np
import pytest

from trtdet import cuda
from trtdet.images.prepare_processes import SharedBuffers
from trtdet.shared_memory import can_share


@pytest.mark.gpu
def test_parts_of_shared_memory_are_pinned_one_by_one() -> None:
    """And a copy to the GPU and back has what was written, also after another one was freed."""
    if missing := gpu_engines.find_gpu():
        pytest.skip(missing)
    if not can_share():
        pytest.skip("this system has no memory to share")
    cuda.use_device(0)
    rng = np.random.default_rng(0)
    with SharedBuffers(cuda.pin) as buffers, cuda.Stream() as stream:
        shapes = [(8, 512, 512, 3), (1, 7, 11, 3), (4, 640, 480, 3)]
        made = [buffers.allocate(shape, np.dtype(np.uint8)) for shape in shapes]
        assert all(cuda.is_pinned(buffer) for buffer in made)
        del made[1]
        gc.collect()
        made.append(buffers.allocate((3, 3, 100, 100), np.dtype(np.float32)))
        assert cuda.is_pinned(made[-1])
        for buffer in made:
            data = rng.integers(0, 256, buffer.nbytes).astype(np.uint8)
            buffer.reshape(-1).view(np.uint8)[:] = data
            back = cuda.pinned_empty((buffer.nbytes,), np.uint8)
            with cuda.DeviceBuffer(buffer.nbytes) as target:
                stream.copy_in(target.handle, buffer)
                stream.copy_out(back, target.handle)
                stream.synchronize()
            assert np.array_equal(back, data)
