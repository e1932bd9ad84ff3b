#include "device_pool.hpp"

#include <algorithm>

namespace computron {

DevicePool::DevicePool(std::shared_ptr<Backend> backend, size_t frame_bytes, size_t frames)
    : backend_(std::move(backend)),
      frame_bytes_(frame_bytes),
      states_(frames, State::kFree),
      pins_(frames, 0),
      free_(frames) {
  const size_t granularity = backend_->granularity();
  if (frames == 0) throw std::invalid_argument("a pool of 0 frames");
  if (frame_bytes == 0 || frame_bytes % granularity != 0) {
    throw std::invalid_argument("frames of " + std::to_string(frame_bytes) + " bytes are not a multiple of " +
                                std::to_string(granularity) + ", the smallest frame of this device");
  }
  memory_ = backend_->create_pool(frame_bytes, frames);
}

size_t DevicePool::free() const {
  std::lock_guard lock(mutex_);
  return free_;
}

std::vector<int64_t> DevicePool::allocate(size_t count) {
  std::lock_guard lock(mutex_);
  if (!memory_) throw TransferError("the pool is closed");
  if (count > free_) {
    throw TransferError("device memory is exhausted: " + std::to_string(count) + " frames wanted, " +
                        std::to_string(free_) + " of " + std::to_string(states_.size()) + " free");
  }
  std::vector<int64_t> frames;
  frames.reserve(count);
  for (; frames.size() < count; ++lowest_) {
    if (states_[lowest_] != State::kFree) continue;
    states_[lowest_] = State::kAllocated;
    frames.push_back(static_cast<int64_t>(lowest_));
  }
  free_ -= count;
  return frames;
}

void DevicePool::release(const std::vector<int64_t>& frames) {
  std::lock_guard lock(mutex_);
  for (size_t index = 0; index < frames.size(); ++index) {
    const int64_t frame = frames[index];
    const bool owned = frame >= 0 && static_cast<size_t>(frame) < states_.size() &&
                       states_[static_cast<size_t>(frame)] == State::kAllocated;
    if (!owned) {
      for (size_t earlier = 0; earlier < index; ++earlier) {
        states_[static_cast<size_t>(frames[earlier])] = State::kAllocated;
      }
      throw TransferError("frame " + std::to_string(frame) + " is not allocated");
    }
    states_[static_cast<size_t>(frame)] = State::kReleased;
  }
  for (const int64_t frame : frames) {
    if (pins_[static_cast<size_t>(frame)] == 0) free_locked(frame);
  }
}

void DevicePool::free_locked(int64_t frame) {
  const auto index = static_cast<size_t>(frame);
  states_[index] = State::kFree;
  lowest_ = std::min(lowest_, index);
  ++free_;
}

void DevicePool::check_frame(int64_t frame) const {
  if (frame < 0 || static_cast<size_t>(frame) >= states_.size()) {
    throw std::invalid_argument("frame " + std::to_string(frame) + " is outside a pool of " +
                                std::to_string(states_.size()));
  }
}

void DevicePool::check_allocated(const std::vector<int64_t>& frames) const {
  std::lock_guard lock(mutex_);
  check_allocated_locked(frames);
}

void DevicePool::check_allocated_locked(const std::vector<int64_t>& frames) const {
  if (!memory_) throw TransferError("the pool is closed");
  for (const int64_t frame : frames) {
    check_frame(frame);
    if (states_[static_cast<size_t>(frame)] != State::kAllocated) {
      throw TransferError("frame " + std::to_string(frame) + " is not allocated");
    }
  }
}

void DevicePool::pin(const std::vector<int64_t>& frames) {
  std::lock_guard lock(mutex_);
  check_allocated_locked(frames);
  for (const int64_t frame : frames) ++pins_[static_cast<size_t>(frame)];
}

void DevicePool::unpin(int64_t frame) {
  std::lock_guard lock(mutex_);
  const auto index = static_cast<size_t>(frame);
  if (--pins_[index] == 0 && states_[index] == State::kReleased) free_locked(frame);
}

uint64_t DevicePool::place(int64_t frame, size_t offset, size_t nbytes) const {
  check_frame(frame);
  if (offset > frame_bytes_ || nbytes > frame_bytes_ - offset) {
    throw std::invalid_argument("bytes " + std::to_string(offset) + " to " + std::to_string(offset + nbytes) +
                                " are outside a frame of " + std::to_string(frame_bytes_));
  }
  return static_cast<uint64_t>(frame) * frame_bytes_ + offset;
}

Digest DevicePool::digest(int64_t frame, size_t nbytes) const {
  return memory()->digest(place(frame, 0, nbytes), nbytes);
}

void DevicePool::read(int64_t frame, size_t offset, void* target, size_t nbytes) const {
  memory()->read(place(frame, offset, nbytes), target, nbytes);
}

void DevicePool::write(int64_t frame, size_t offset, const void* source, size_t nbytes) {
  memory()->write(place(frame, offset, nbytes), source, nbytes);
}

std::shared_ptr<PoolMemory> DevicePool::memory() const {
  std::lock_guard lock(mutex_);
  if (!memory_) throw TransferError("the pool is closed");
  return memory_;
}

void DevicePool::close() {
  std::shared_ptr<PoolMemory> last;
  std::lock_guard lock(mutex_);
  last.swap(memory_);
}

}  // namespace computron
