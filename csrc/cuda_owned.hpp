// Owners of what the driver hands out. The context must be current where they are made; they see to it themselves
// where they are freed.
#pragma once

#include <utility>

#include "cuda_context.hpp"

namespace computron::cuda {

// Owns a `Handle` that `Traits` knows how to free.
template <typename Handle, typename Free>
class Owned {
 public:
  Owned(const PrimaryContext& context, Handle handle) : context_(&context), handle_(handle) {}
  Owned(Owned&& other) noexcept : context_(std::exchange(other.context_, nullptr)), handle_(other.handle_) {}
  Owned& operator=(Owned&&) = delete;
  ~Owned() {
    if (!context_) return;
    try {
      const PrimaryContext::Current current(*context_);
      context_->note(Free()(context_->driver(), handle_));
    } catch (const TransferError&) {
      // The device is gone, and what it handed out with it.
    }
  }
  Handle get() const { return handle_; }

 private:
  const PrimaryContext* context_;
  Handle handle_;
};

struct FreeStream {
  Result operator()(const Driver& driver, Stream stream) const { return driver.cuStreamDestroy(stream); }
};
struct FreeEvent {
  Result operator()(const Driver& driver, Event event) const { return driver.cuEventDestroy(event); }
};
struct FreeModule {
  Result operator()(const Driver& driver, Module module) const { return driver.cuModuleUnload(module); }
};
struct FreeMemory {
  Result operator()(const Driver& driver, DevicePointer pointer) const { return driver.cuMemFree(pointer); }
};
struct FreeAllocation {
  Result operator()(const Driver& driver, AllocationHandle handle) const { return driver.cuMemRelease(handle); }
};

using OwnedStream = Owned<Stream, FreeStream>;
using OwnedEvent = Owned<Event, FreeEvent>;
using OwnedModule = Owned<Module, FreeModule>;
using OwnedMemory = Owned<DevicePointer, FreeMemory>;
using OwnedAllocation = Owned<AllocationHandle, FreeAllocation>;

OwnedStream create_stream(const PrimaryContext& context);
// Waiting for it blocks the thread instead of spinning.
OwnedEvent create_event(const PrimaryContext& context);

}  // namespace computron::cuda
