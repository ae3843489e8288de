// SPDX-License-Identifier: Apache-2.0
// Lets a C++ compiler read a CUDA kernel that uses no more than its indices: the loops of a launch
// are written out in kernel_on_cpu.py.
#pragma once
#include <cmath>
#include <cstddef>
#define __global__
#define __device__
struct Index { int x, y, z; };
static thread_local Index blockIdx, blockDim, threadIdx;
