// The compiled device kernels, embedded by the build. 0 bytes if it found no nvcc.
#pragma once

#include <cstddef>

namespace computron {

extern const unsigned char kKernels[];
extern const size_t kKernelBytes;

}  // namespace computron
