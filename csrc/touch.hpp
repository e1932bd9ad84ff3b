// Makes memory present before it is used, in parallel.
#pragma once

#include <cstddef>

namespace computron {

constexpr size_t kHugePage = size_t{2} << 20;

// Every page of the range, writable, without changing its bytes. `collapse`: into huge pages where the system can, also
// in shared memory, which MADV_HUGEPAGE does not reach on most systems. Throws TransferError when memory runs out.
void touch(void* address, size_t nbytes, size_t threads, bool collapse = false);

}  // namespace computron
