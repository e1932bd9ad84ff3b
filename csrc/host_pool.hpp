// Device memory of the host backend: one memfd, whose frames can be mapped at many places.
#pragma once

#include "host_backend.hpp"
#include "owned.hpp"

namespace computron {

class HostPool : public PoolMemory {
 public:
  HostPool(HostBackend& backend, size_t frame_bytes, size_t frames);

  uint64_t address() const override { return reinterpret_cast<uint64_t>(linear_); }
  std::unique_ptr<Reservation> reserve(size_t slots) override;
  void read(uint64_t offset, void* target, size_t nbytes) override;
  void write(uint64_t offset, const void* source, size_t nbytes) override;
  Digest digest(uint64_t offset, size_t nbytes) override;

 private:
  HostBackend& backend_;
  const size_t frame_bytes_;
  FileDescriptor memory_;
  Mapping reserved_;  // the linear mapping and its alignment
  char* linear_ = nullptr;
};

}  // namespace computron
