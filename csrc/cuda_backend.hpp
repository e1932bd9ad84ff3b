// A CUDA device, through its driver.
#pragma once

#include "backend.hpp"
#include "cuda_context.hpp"

namespace computron {

class CudaBackend : public Backend {
 public:
  // Throws TransferError if the device cannot be used.
  CudaBackend(int index, const std::string& library);

  std::string kind() const override { return "cuda"; }
  std::string device_name() const override;
  int device_index() const override { return index_; }
  size_t granularity() const override;
  size_t free_memory() const override;
  bool host_accessible() const override { return context_.driver().standin_inject != nullptr; }
  bool has_streams() const override { return true; }
  bool stages_pageable() const override { return true; }
  bool can_discard() const override { return false; }
  int numa_node() const override;

  void inject_fault(const std::string& operation, uint64_t after, const std::string& message) override;
  std::unique_ptr<PoolMemory> create_pool(size_t frame_bytes, size_t frames) override;
  std::unique_ptr<Copier> create_copier(Direction direction) override;
  void pin(void* address, size_t nbytes) override;
  void unpin(void* address) noexcept override;

 private:
  const int index_;
  const cuda::PrimaryContext context_;
};

// Why no CUDA device can be used, in words for a person.
std::optional<std::string> cuda_unavailable_reason(const std::string& library);

}  // namespace computron
