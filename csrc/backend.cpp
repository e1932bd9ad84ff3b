#include "backend.hpp"

#include "host_memory.hpp"

namespace computron {

std::optional<std::string> Backend::failed() const {
  std::lock_guard lock(mutex_);
  return failed_;
}

void Backend::ensure_alive() const {
  if (const auto words = failed()) throw DeviceFailed(*words);
}

void Backend::mark_failed(const std::string& words) {
  std::lock_guard lock(mutex_);
  if (!failed_) failed_ = words;
}

std::shared_ptr<HostRegion> Backend::region_of(const void* address, size_t nbytes) const {
  const auto first = reinterpret_cast<uintptr_t>(address);
  std::shared_ptr<HostRegion> region;
  {
    std::lock_guard lock(mutex_);
    auto after = regions_.upper_bound(first);
    if (after != regions_.begin()) region = std::prev(after)->second.lock();
  }
  if (!region || !region->holds(first, nbytes)) {
    throw TransferError("a page at address " + std::to_string(first) +
                        " is not inside one committed slab of a HostMemory of this backend");
  }
  return region;
}

void Backend::add_region(const std::shared_ptr<HostRegion>& region) {
  std::lock_guard lock(mutex_);
  regions_[region->address()] = region;
}

void Backend::remove_region(const HostRegion& region) noexcept {
  std::lock_guard lock(mutex_);
  regions_.erase(region.address());
}

}  // namespace computron
