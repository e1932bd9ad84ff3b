#include "cuda_backend.hpp"

#include "cuda_copier.hpp"
#include "cuda_pool.hpp"
#include "fault.hpp"

namespace computron {

using cuda::PrimaryContext;

CudaBackend::CudaBackend(int index, const std::string& library)
    : index_(index),
      context_(cuda::load_driver(library), index, [this](const std::string& words) { mark_failed(words); }) {
  if (context_.attribute(cuda::kAttributeVirtualMemory, 0) == 0) {
    throw TransferError(device_name() + " has no virtual memory management, which is needed");
  }
}

std::string CudaBackend::device_name() const {
  char name[256] = "";
  CUDA_CALL(context_, cuDeviceGetName, name, sizeof name, context_.device());
  return name;
}

size_t CudaBackend::granularity() const {
  const cuda::AllocationProperties properties = cuda::frame_properties(context_);
  size_t nbytes = 0;
  CUDA_CALL(context_, cuMemGetAllocationGranularity, &nbytes, &properties, cuda::kGranularityMinimum);
  return nbytes;
}

size_t CudaBackend::free_memory() const {
  ensure_alive();
  const PrimaryContext::Current current(context_);
  size_t free = 0, total = 0;
  CUDA_CALL(context_, cuMemGetInfo, &free, &total);
  return free;
}

int CudaBackend::numa_node() const { return context_.attribute(cuda::kAttributeHostNumaId, -1); }

void CudaBackend::inject_fault(const std::string& operation, uint64_t after, const std::string& message) {
  const cuda::StandinInject inject = context_.driver().standin_inject;
  if (!inject) throw TransferError("faults can be injected into the stand-in driver only, not into a real device");
  Faults::require(operation);
  inject(operation.c_str(), after, message.c_str());
}

std::unique_ptr<PoolMemory> CudaBackend::create_pool(size_t frame_bytes, size_t frames) {
  ensure_alive();
  return std::make_unique<CudaPool>(*this, context_, frame_bytes, frames);
}

std::unique_ptr<Copier> CudaBackend::create_copier(Direction direction) {
  ensure_alive();
  return std::make_unique<CudaCopier>(*this, context_, direction);
}

void CudaBackend::pin(void* address, size_t nbytes) {
  ensure_alive();
  const PrimaryContext::Current current(context_);
  CUDA_CALL(context_, cuMemHostRegister, address, nbytes, cuda::kHostRegisterPortable);
}

void CudaBackend::unpin(void* address) noexcept {
  try {
    const PrimaryContext::Current current(context_);
    context_.note(context_.driver().cuMemHostUnregister(address));
  } catch (const TransferError&) {
    // The device is gone, and its registrations with it.
  }
}

std::optional<std::string> cuda_unavailable_reason(const std::string& library) {
  try {
    const CudaBackend backend(0, library);
    return std::nullopt;
  } catch (const TransferError& error) {
    return error.what();
  }
}

}  // namespace computron
