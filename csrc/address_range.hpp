// Device addresses that stay, behind which frames come and go.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "device_pool.hpp"

namespace computron {

class AddressRange {
 public:
  // `nbytes` is rounded up to frames.
  AddressRange(std::shared_ptr<DevicePool> pool, size_t nbytes);

  uint64_t address() const { return address_; }
  size_t nbytes() const { return frames_.size() * pool_->frame_bytes(); }
  const Backend& backend() const { return *pool_->backend(); }

  // Throws, and maps nothing, if a slot is mapped already or a frame is not allocated.
  void map(const std::vector<int64_t>& slots, const std::vector<int64_t>& frames);
  // Throws, and unmaps nothing, if a slot is not mapped.
  void unmap(const std::vector<int64_t>& slots);
  std::vector<int64_t> mapped() const;
  // Unmaps everything. The addresses stay reserved until the last view is gone.
  void close();

 private:
  static constexpr int64_t kUnmapped = -1;

  void check_slots(const std::vector<int64_t>& slots, bool mapped) const;
  void unmap_sorted(const std::vector<int64_t>& slots);

  const std::shared_ptr<DevicePool> pool_;
  const std::shared_ptr<PoolMemory> memory_;
  const std::unique_ptr<Reservation> reservation_;
  const uint64_t address_;
  mutable std::mutex mutex_;
  std::vector<int64_t> frames_;  // of each slot
  bool closed_ = false;
};

}  // namespace computron
