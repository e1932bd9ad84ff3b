#include "address_range.hpp"

#include <algorithm>
#include <numeric>

namespace computron {
namespace {

size_t slots_for(size_t nbytes, size_t frame_bytes) {
  if (nbytes == 0) throw std::invalid_argument("an address range of 0 bytes");
  return (nbytes + frame_bytes - 1) / frame_bytes;
}

// Calls visit(begin, end) for each run of neighbours in `slots`, which is sorted.
template <typename Visit>
void for_each_run(const std::vector<int64_t>& slots, Visit visit) {
  for (size_t begin = 0; begin < slots.size();) {
    size_t end = begin + 1;
    while (end < slots.size() && slots[end] == slots[end - 1] + 1) ++end;
    visit(begin, end);
    begin = end;
  }
}

}  // namespace

AddressRange::AddressRange(std::shared_ptr<DevicePool> pool, size_t nbytes)
    : pool_(std::move(pool)),
      memory_(pool_->memory()),
      reservation_(memory_->reserve(slots_for(nbytes, pool_->frame_bytes()))),
      address_(reservation_->address()),
      frames_(slots_for(nbytes, pool_->frame_bytes()), kUnmapped) {}

void AddressRange::check_slots(const std::vector<int64_t>& slots, bool mapped) const {
  if (closed_) throw TransferError("the address range is closed");
  std::vector<int64_t> sorted = slots;
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
    throw std::invalid_argument("a slot is named twice");
  }
  for (const int64_t slot : slots) {
    if (slot < 0 || static_cast<size_t>(slot) >= frames_.size()) {
      throw std::invalid_argument("slot " + std::to_string(slot) + " is outside a range of " +
                                  std::to_string(frames_.size()));
    }
    if ((frames_[static_cast<size_t>(slot)] != kUnmapped) != mapped) {
      throw TransferError("slot " + std::to_string(slot) + (mapped ? " is not mapped" : " is mapped already"));
    }
  }
}

void AddressRange::map(const std::vector<int64_t>& slots, const std::vector<int64_t>& frames) {
  if (slots.size() != frames.size()) throw std::invalid_argument("there must be as many slots as frames");
  std::lock_guard lock(mutex_);
  check_slots(slots, false);
  pool_->check_allocated(frames);
  std::vector<size_t> order(slots.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return slots[a] < slots[b]; });
  std::vector<int64_t> sorted_slots, sorted_frames;
  for (const size_t index : order) {
    sorted_slots.push_back(slots[index]);
    sorted_frames.push_back(frames[index]);
  }
  std::vector<int64_t> done;
  try {
    for_each_run(sorted_slots, [&](size_t begin, size_t end) {
      reservation_->map(static_cast<size_t>(sorted_slots[begin]), &sorted_frames[begin], end - begin);
      for (size_t index = begin; index < end; ++index) {
        frames_[static_cast<size_t>(sorted_slots[index])] = sorted_frames[index];
        done.push_back(sorted_slots[index]);
      }
    });
  } catch (const TransferError&) {
    unmap_sorted(done);
    throw;
  }
}

void AddressRange::unmap(const std::vector<int64_t>& slots) {
  std::lock_guard lock(mutex_);
  check_slots(slots, true);
  std::vector<int64_t> sorted = slots;
  std::sort(sorted.begin(), sorted.end());
  unmap_sorted(sorted);
}

void AddressRange::unmap_sorted(const std::vector<int64_t>& slots) {
  for_each_run(slots, [&](size_t begin, size_t end) {
    reservation_->unmap(static_cast<size_t>(slots[begin]), end - begin);
    for (size_t index = begin; index < end; ++index) frames_[static_cast<size_t>(slots[index])] = kUnmapped;
  });
}

std::vector<int64_t> AddressRange::mapped() const {
  std::lock_guard lock(mutex_);
  return frames_;
}

void AddressRange::close() {
  std::lock_guard lock(mutex_);
  if (closed_) return;
  closed_ = true;
  std::vector<int64_t> slots;
  for (size_t slot = 0; slot < frames_.size(); ++slot) {
    if (frames_[slot] != kUnmapped) slots.push_back(static_cast<int64_t>(slot));
  }
  try {
    unmap_sorted(slots);
  } catch (const DeviceFailed&) {
    // The device is gone, and its mappings with it.
    std::fill(frames_.begin(), frames_.end(), kUnmapped);
  }
}

}  // namespace computron
