#include "cuda_digest.hpp"

#include "kernels.hpp"

namespace computron {
namespace {

using cuda::PrimaryContext;

constexpr unsigned kBlock = 128;
constexpr unsigned kThreadsPerLeaf = 4;

// Errors by which a driver says that it cannot use an image: another architecture, a newer format, no compiler.
bool is_unusable_image(cuda::Result result) {
  switch (result) {
    case 200:  // invalid image
    case 209:  // no binary for this GPU
    case 218:  // invalid PTX
    case 221:  // no JIT compiler
    case 222:  // PTX of a newer version
    case 223:  // JIT compilation disabled
    case 801:  // not supported
      return true;
    default:
      return false;
  }
}

}  // namespace

CudaDigest::CudaDigest(const PrimaryContext& context, size_t frame_bytes)
    : context_(context), most_leaves_(leaf_count(frame_bytes)) {}

void CudaDigest::load() {
  tried_ = true;
  if (kKernelBytes == 0) return;
  cuda::Module module = nullptr;
  const cuda::Result result = context_.driver().cuModuleLoadData(&module, kKernels);
  if (is_unusable_image(result)) return;
  context_.check(result, "cuModuleLoadData", __FILE__, __LINE__);
  module_.emplace(context_, module);
  CUDA_CALL(context_, cuModuleGetFunction, &kernel_, module, "page_leaves");
  cuda::DevicePointer leaves = 0;
  CUDA_CALL(context_, cuMemAlloc, &leaves, most_leaves_ * sizeof(uint64_t));
  leaves_.emplace(context_, leaves);
  stream_.emplace(cuda::create_stream(context_));
}

std::optional<Digest> CudaDigest::compute(cuda::DevicePointer page, size_t nbytes) {
  std::lock_guard lock(mutex_);
  const PrimaryContext::Current current(context_);
  if (!tried_) load();
  if (!stream_) return std::nullopt;
  std::vector<uint64_t> leaves(leaf_count(nbytes));
  unsigned long long size = nbytes, count = leaves.size();
  cuda::DevicePointer target = leaves_->get();
  if (count > 0) {
    void* parameters[] = {&page, &size, &target, &count};
    const auto blocks = static_cast<unsigned>((count * kThreadsPerLeaf + kBlock - 1) / kBlock);
    CUDA_CALL(context_, cuLaunchKernel, kernel_, blocks, 1, 1, kBlock, 1, 1, 0, stream_->get(), parameters, nullptr);
    CUDA_CALL(context_, cuMemcpyDtoHAsync, leaves.data(), target, count * sizeof(uint64_t), stream_->get());
    CUDA_CALL(context_, cuStreamSynchronize, stream_->get());
  }
  return digest_of_leaves(leaves);
}

}  // namespace computron
