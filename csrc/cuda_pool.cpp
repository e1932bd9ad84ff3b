#include "cuda_pool.hpp"

namespace computron {
namespace cuda {

AllocationProperties frame_properties(const PrimaryContext& context) {
  AllocationProperties properties{};
  properties.type = kAllocationTypePinned;
  properties.location = {kLocationTypeDevice, context.device()};
  return properties;
}

AddressSpace::AddressSpace(const PrimaryContext& context, size_t frame_bytes, size_t slots)
    : context_(context), frame_bytes_(frame_bytes), mapped_(slots, false) {
  const PrimaryContext::Current current(context_);
  CUDA_CALL(context_, cuMemAddressReserve, &address_, frame_bytes * slots, 0, 0, 0);
}

AddressSpace::~AddressSpace() {
  try {
    const PrimaryContext::Current current(context_);
    for (size_t slot = 0; slot < mapped_.size(); ++slot) {
      if (mapped_[slot]) context_.note(context_.driver().cuMemUnmap(place(slot), frame_bytes_));
    }
    context_.note(context_.driver().cuMemAddressFree(address_, frame_bytes_ * mapped_.size()));
  } catch (const TransferError&) {
    // The device is gone, and its addresses with it.
  }
}

void AddressSpace::map(size_t slot, const std::vector<AllocationHandle>& handles) {
  const PrimaryContext::Current current(context_);
  size_t done = 0;
  try {
    for (; done < handles.size(); ++done) {
      CUDA_CALL(context_, cuMemMap, place(slot + done), frame_bytes_, 0, handles[done], 0);
      mapped_[slot + done] = true;
    }
    const AccessDescription access{{kLocationTypeDevice, context_.device()}, kAccessReadWrite};
    CUDA_CALL(context_, cuMemSetAccess, place(slot), frame_bytes_ * handles.size(), &access, 1);
  } catch (const TransferError&) {
    for (size_t index = slot; index < slot + done; ++index) {
      context_.note(context_.driver().cuMemUnmap(place(index), frame_bytes_));
      mapped_[index] = false;
    }
    throw;
  }
}

void AddressSpace::unmap(size_t slot, size_t count) {
  const PrimaryContext::Current current(context_);
  CUDA_CALL(context_, cuMemUnmap, place(slot), frame_bytes_ * count);
  for (size_t index = slot; index < slot + count; ++index) mapped_[index] = false;
}

}  // namespace cuda

namespace {

using cuda::PrimaryContext;

class CudaReservation : public Reservation {
 public:
  CudaReservation(Backend& backend, const PrimaryContext& context, const std::vector<cuda::OwnedAllocation>& frames,
                  size_t frame_bytes, size_t slots)
      : backend_(backend), frames_(frames), space_(context, frame_bytes, slots) {}

  uint64_t address() const override { return space_.address(); }

  void map(size_t slot, const int64_t* frames, size_t count) override {
    backend_.ensure_alive();
    std::vector<cuda::AllocationHandle> handles;
    for (size_t index = 0; index < count; ++index) {
      handles.push_back(frames_[static_cast<size_t>(frames[index])].get());
    }
    space_.map(slot, handles);
  }

  void unmap(size_t slot, size_t count) override {
    backend_.ensure_alive();
    space_.unmap(slot, count);
  }

 private:
  Backend& backend_;
  const std::vector<cuda::OwnedAllocation>& frames_;
  cuda::AddressSpace space_;
};

std::vector<cuda::OwnedAllocation> create_frames(const PrimaryContext& context, size_t frame_bytes, size_t count) {
  const PrimaryContext::Current current(context);
  const cuda::AllocationProperties properties = cuda::frame_properties(context);
  std::vector<cuda::OwnedAllocation> frames;
  frames.reserve(count);
  for (size_t index = 0; index < count; ++index) {
    cuda::AllocationHandle handle = 0;
    CUDA_CALL(context, cuMemCreate, &handle, frame_bytes, &properties, 0);
    frames.emplace_back(context, handle);
  }
  return frames;
}

}  // namespace

CudaPool::CudaPool(Backend& backend, const PrimaryContext& context, size_t frame_bytes, size_t frames)
    : backend_(backend),
      context_(context),
      frame_bytes_(frame_bytes),
      frames_(create_frames(context, frame_bytes, frames)),
      linear_(context, frame_bytes, frames),
      stream_(cuda::create_stream(context)),
      digest_(context, frame_bytes) {
  std::vector<cuda::AllocationHandle> handles;
  for (const cuda::OwnedAllocation& frame : frames_) handles.push_back(frame.get());
  linear_.map(0, handles);
}

std::unique_ptr<Reservation> CudaPool::reserve(size_t slots) {
  backend_.ensure_alive();
  return std::make_unique<CudaReservation>(backend_, context_, frames_, frame_bytes_, slots);
}

void CudaPool::read(uint64_t offset, void* target, size_t nbytes) {
  backend_.ensure_alive();
  const PrimaryContext::Current current(context_);
  CUDA_CALL(context_, cuMemcpyDtoHAsync, target, address() + offset, nbytes, stream_.get());
  CUDA_CALL(context_, cuStreamSynchronize, stream_.get());
}

void CudaPool::write(uint64_t offset, const void* source, size_t nbytes) {
  backend_.ensure_alive();
  const PrimaryContext::Current current(context_);
  CUDA_CALL(context_, cuMemcpyHtoDAsync, address() + offset, source, nbytes, stream_.get());
  CUDA_CALL(context_, cuStreamSynchronize, stream_.get());
}

Digest CudaPool::digest(uint64_t offset, size_t nbytes) {
  backend_.ensure_alive();
  if (auto digest = digest_.compute(address() + offset, nbytes)) return *digest;
  std::vector<unsigned char> page(nbytes);
  read(offset, page.data(), nbytes);
  return page_digest(page.data(), nbytes);
}

}  // namespace computron
