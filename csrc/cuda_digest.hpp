// The digest of a page where the page is: leaves by a kernel, the rest from the leaves on the host.
#pragma once

#include <mutex>
#include <optional>

#include "cuda_owned.hpp"
#include "digest.hpp"

namespace computron {

class CudaDigest {
 public:
  CudaDigest(const cuda::PrimaryContext& context, size_t frame_bytes);

  // Nothing if there is no kernel for this device: the build found no nvcc, or the driver cannot load what it made.
  std::optional<Digest> compute(cuda::DevicePointer page, size_t nbytes);

 private:
  void load();

  const cuda::PrimaryContext& context_;
  const size_t most_leaves_;
  std::mutex mutex_;
  bool tried_ = false;
  std::optional<cuda::OwnedModule> module_;
  cuda::Function kernel_ = nullptr;
  std::optional<cuda::OwnedStream> stream_;
  std::optional<cuda::OwnedMemory> leaves_;
};

}  // namespace computron
