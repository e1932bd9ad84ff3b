// Device memory of the CUDA backend: an allocation a frame, each mapped into one linear range for good.
#pragma once

#include <vector>

#include "backend.hpp"
#include "cuda_digest.hpp"
#include "cuda_owned.hpp"

namespace computron {
namespace cuda {

AllocationProperties frame_properties(const PrimaryContext& context);

// Reserved addresses, into which frames are mapped; unmapped and given back in the end.
class AddressSpace {
 public:
  AddressSpace(const PrimaryContext& context, size_t frame_bytes, size_t slots);
  ~AddressSpace();
  AddressSpace(const AddressSpace&) = delete;
  AddressSpace& operator=(const AddressSpace&) = delete;

  DevicePointer address() const { return address_; }
  // Maps and gives access; maps nothing if it throws.
  void map(size_t slot, const std::vector<AllocationHandle>& handles);
  void unmap(size_t slot, size_t count);

 private:
  DevicePointer place(size_t slot) const { return address_ + slot * frame_bytes_; }

  const PrimaryContext& context_;
  const size_t frame_bytes_;
  std::vector<bool> mapped_;
  DevicePointer address_ = 0;
};

}  // namespace cuda

class CudaPool : public PoolMemory {
 public:
  CudaPool(Backend& backend, const cuda::PrimaryContext& context, size_t frame_bytes, size_t frames);

  uint64_t address() const override { return linear_.address(); }
  std::unique_ptr<Reservation> reserve(size_t slots) override;
  void read(uint64_t offset, void* target, size_t nbytes) override;
  void write(uint64_t offset, const void* source, size_t nbytes) override;
  Digest digest(uint64_t offset, size_t nbytes) override;

 private:
  Backend& backend_;
  const cuda::PrimaryContext& context_;
  const size_t frame_bytes_;
  std::vector<cuda::OwnedAllocation> frames_;
  cuda::AddressSpace linear_;
  const cuda::OwnedStream stream_;
  CudaDigest digest_;
};

}  // namespace computron
