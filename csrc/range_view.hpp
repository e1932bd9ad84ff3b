// A DLPack tensor over an address range.
#pragma once

#include <memory>

#include "address_range.hpp"
#include "dlpack.hpp"

namespace computron {

// The whole range as uint8; holds the range until its deleter is called, from any thread, with or without the GIL.
dlpack::ManagedTensor* view_of(const std::shared_ptr<AddressRange>& range);

}  // namespace computron
