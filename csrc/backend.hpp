// What a device must be able to do. Everything above this interface is the same for every device.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "digest.hpp"
#include "error.hpp"

namespace computron {

class HostRegion;

enum class Direction { kToDevice, kToHost };

// One chunk to copy. `device` is an address in the linear range of a PoolMemory.
struct Copy {
  uint64_t device = 0;
  void* host = nullptr;
  size_t nbytes = 0;
  bool staged = false;                            // the host side is a staging chunk: travels beside the pinned ones
  std::chrono::steady_clock::time_point ready{};  // since when it could have travelled
};

// One copy under way. Shared by the lane that submitted it and by those who wait for it.
class Ticket {
 public:
  virtual ~Ticket() = default;
  // Blocks until the copy has ended. Throws TransferError if it failed.
  virtual void wait() = 0;
  // Work submitted to `stream` from now on runs after the copy. Blocks where the device has no streams.
  virtual void make_wait(uint64_t stream) = 0;
};

// Carries out copies of one direction. Thread-safe.
class Copier {
 public:
  virtual ~Copier() = default;
  // Without streams the copy is made in the ticket's wait, by the thread that submitted it.
  virtual std::shared_ptr<Ticket> submit(const Copy& copy) = 0;
};

// Addresses reserved for frames of a pool.
class Reservation {
 public:
  virtual ~Reservation() = default;
  virtual uint64_t address() const = 0;
  // Map frames[i] at slot + i for all i < count; maps nothing if it throws.
  virtual void map(size_t slot, const int64_t* frames, size_t count) = 0;
  virtual void unmap(size_t slot, size_t count) = 0;
};

// The memory of a pool. Every frame stays mapped at frame * frame_bytes of one linear range, through which all
// copies and digests go: they do not depend on where else a frame is mapped.
class PoolMemory {
 public:
  virtual ~PoolMemory() = default;
  virtual uint64_t address() const = 0;
  virtual std::unique_ptr<Reservation> reserve(size_t slots) = 0;
  virtual void read(uint64_t offset, void* target, size_t nbytes) = 0;
  virtual void write(uint64_t offset, const void* source, size_t nbytes) = 0;
  virtual Digest digest(uint64_t offset, size_t nbytes) = 0;
};

class Backend : public std::enable_shared_from_this<Backend> {
 public:
  virtual ~Backend() = default;

  virtual std::string kind() const = 0;
  virtual std::string device_name() const = 0;
  virtual int device_index() const = 0;
  virtual size_t granularity() const = 0;
  virtual size_t free_memory() const = 0;
  // Can the CPU read what is mapped in an address range?
  virtual bool host_accessible() const = 0;
  // Do copies and waits for them happen on the device?
  virtual bool has_streams() const = 0;
  // Threads that submit copies of one direction.
  virtual size_t copy_threads() const { return 1; }
  // Must pageable memory be staged before it can travel?
  virtual bool stages_pageable() const = 0;
  // NUMA node of the device, -1 if there is none or it is unknown.
  virtual int numa_node() const { return -1; }

  // Throws std::invalid_argument unless Faults knows the operation.
  virtual void inject_fault(const std::string& operation, uint64_t after, const std::string& message) = 0;
  virtual std::unique_ptr<PoolMemory> create_pool(size_t frame_bytes, size_t frames) = 0;
  virtual std::unique_ptr<Copier> create_copier(Direction direction) = 0;
  // Make host memory known to the device, so that copies from it need no staging.
  virtual void pin(void* address, size_t nbytes) = 0;
  virtual void unpin(void* address) noexcept = 0;
  // Can part of a pinned slab go back to the system?
  virtual bool can_discard() const = 0;

  // Words of the sticky error, if there was one.
  std::optional<std::string> failed() const;
  // Throws DeviceFailed after a sticky error.
  void ensure_alive() const;
  void mark_failed(const std::string& words);

  // The region whose committed memory holds [address, address + nbytes) within one slab; throws TransferError if none.
  std::shared_ptr<HostRegion> region_of(const void* address, size_t nbytes) const;
  void add_region(const std::shared_ptr<HostRegion>& region);
  void remove_region(const HostRegion& region) noexcept;

 private:
  mutable std::mutex mutex_;
  std::optional<std::string> failed_;
  std::map<uintptr_t, std::weak_ptr<HostRegion>> regions_;  // by first address
};

}  // namespace computron
