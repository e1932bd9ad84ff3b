// Host memory as a device: memcpy for copies, a memfd for device memory, an emulated link if wanted.
#pragma once

#include <string>

#include "backend.hpp"
#include "emulated_link.hpp"
#include "fault.hpp"

namespace computron {

class HostBackend : public Backend {
 public:
  // `bandwidth` in bytes a second (0: as fast as memcpy), `latency` in seconds a chunk.
  HostBackend(double bandwidth, double latency, size_t copy_threads);

  std::string kind() const override { return "host"; }
  std::string device_name() const override;
  int device_index() const override { return 0; }
  size_t granularity() const override;
  size_t free_memory() const override;
  bool host_accessible() const override { return true; }
  bool has_streams() const override { return false; }
  size_t copy_threads() const override { return copy_threads_; }
  bool stages_pageable() const override { return false; }
  bool can_discard() const override { return true; }

  void inject_fault(const std::string& operation, uint64_t after, const std::string& message) override;
  std::unique_ptr<PoolMemory> create_pool(size_t frame_bytes, size_t frames) override;
  std::unique_ptr<Copier> create_copier(Direction direction) override;
  void pin(void*, size_t) override { ensure_alive(); }
  void unpin(void*) noexcept override {}

  // Throws the planned fault of `operation`, if this call is the one to fail.
  void strike(const std::string& operation);
  // As `strike`, for the fault that kills the device.
  void strike_device();
  EmulatedLink& link(Direction direction) { return direction == Direction::kToDevice ? to_device_ : to_host_; }

 private:
  const double bandwidth_;
  const size_t copy_threads_;
  EmulatedLink to_device_;
  EmulatedLink to_host_;
  Faults faults_;
};

}  // namespace computron
