// Makes memory present before it is used, in parallel.
#pragma once

#include <cstddef>

namespace computron {

// Every page of the range, writable, without changing its bytes. Throws TransferError when memory runs out.
void touch(void* address, size_t nbytes, size_t threads);

}  // namespace computron
