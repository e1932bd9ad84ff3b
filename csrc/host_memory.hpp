// Host memory for pages: reserved at once, committed and pinned slab by slab.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "backend.hpp"

namespace computron {

class HostRegion {
 public:
  static constexpr size_t kDefaultSlabBytes = size_t{64} << 20;

  // `numa_node` -1: the device's node where it is known. `slab_bytes` 0: kDefaultSlabBytes.
  static std::shared_ptr<HostRegion> create(std::shared_ptr<Backend> backend, size_t nbytes, int numa_node,
                                            size_t slab_bytes);
  ~HostRegion();
  HostRegion(const HostRegion&) = delete;
  HostRegion& operator=(const HostRegion&) = delete;

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(base_); }
  size_t nbytes() const { return nbytes_; }
  size_t committed() const;

  // Touch (with `threads` threads) and pin the slabs that hold the range. Idempotent.
  void commit(size_t offset, size_t nbytes, size_t threads);
  // Zero the range and give its memory back to the system, where the backend can.
  void discard(size_t offset, size_t nbytes);
  // Is the range inside one committed slab?
  bool holds(uintptr_t address, size_t nbytes) const;
  void check_range(size_t offset, size_t nbytes) const;

 private:
  HostRegion(std::shared_ptr<Backend> backend, size_t nbytes, int numa_node, size_t slab_bytes);
  size_t slab_end(size_t slab) const;
  void commit_slab(size_t slab, size_t threads);

  const std::shared_ptr<Backend> backend_;
  const size_t nbytes_;
  const bool node_is_named_;
  const int numa_node_;
  const size_t slab_bytes_;
  size_t reserved_ = 0;
  char* base_ = nullptr;
  std::mutex committing_;
  mutable std::mutex mutex_;
  std::vector<bool> slabs_;  // committed?
  size_t committed_ = 0;
};

}  // namespace computron
