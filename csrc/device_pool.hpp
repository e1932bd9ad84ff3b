// Device memory cut into frames: who owns which.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "backend.hpp"

namespace computron {

class DevicePool {
 public:
  DevicePool(std::shared_ptr<Backend> backend, size_t frame_bytes, size_t frames);

  const std::shared_ptr<Backend>& backend() const { return backend_; }
  size_t frame_bytes() const { return frame_bytes_; }
  size_t frames() const { return states_.size(); }
  size_t free() const;

  // The lowest free frames. Throws TransferError, and takes none, if fewer are free.
  std::vector<int64_t> allocate(size_t count);
  // Throws TransferError, and releases none, if one is not allocated or named twice.
  void release(const std::vector<int64_t>& frames);
  void check_allocated(const std::vector<int64_t>& frames) const;

  // A pinned frame that is released becomes free when its last pin is gone.
  void pin(const std::vector<int64_t>& frames);
  void unpin(int64_t frame);

  Digest digest(int64_t frame, size_t nbytes) const;
  void read(int64_t frame, size_t offset, void* target, size_t nbytes) const;
  void write(int64_t frame, size_t offset, const void* source, size_t nbytes);

  // The memory, which lives as long as anyone holds it. Throws TransferError after close.
  std::shared_ptr<PoolMemory> memory() const;
  void close();

 private:
  enum class State : uint8_t { kFree, kAllocated, kReleased };

  void check_frame(int64_t frame) const;
  void check_allocated_locked(const std::vector<int64_t>& frames) const;
  uint64_t place(int64_t frame, size_t offset, size_t nbytes) const;
  void free_locked(int64_t frame);

  const std::shared_ptr<Backend> backend_;
  const size_t frame_bytes_;
  mutable std::mutex mutex_;
  std::shared_ptr<PoolMemory> memory_;
  std::vector<State> states_;
  std::vector<uint32_t> pins_;
  size_t free_;
  size_t lowest_ = 0;  // no frame below is free
};

}  // namespace computron
