#include "cuda_context.hpp"

#include <cstring>

namespace computron::cuda {
namespace {

// After these the driver answers every further call with an error.
bool is_sticky(Result result) {
  switch (result) {
    case 46:   // device unavailable
    case 214:  // uncorrectable ECC error
    case 220:  // uncorrectable NVLink error
    case 226:  // contained error
    case 700:  // illegal address
    case 702:  // launch timeout
    case 709:  // context destroyed
    case 710:  // assert
    case 714:  // hardware stack error
    case 715:  // illegal instruction
    case 716:  // misaligned address
    case 717:  // invalid address space
    case 718:  // invalid program counter
    case 719:  // launch failed
    case 721:  // tensor memory leak
    case 810:  // MPS client terminated
    case 911:  // external device
    case 999:  // unknown
      return true;
    default:
      return false;
  }
}

}  // namespace

PrimaryContext::PrimaryContext(const Driver& driver, int index, std::function<void(const std::string&)> on_sticky)
    : driver_(driver), on_sticky_(std::move(on_sticky)) {
  CUDA_CALL(*this, cuDeviceGet, &device_, index);
  CUDA_CALL(*this, cuDevicePrimaryCtxRetain, &context_, device_);
}

PrimaryContext::~PrimaryContext() { note(driver_.cuDevicePrimaryCtxRelease(device_)); }

int PrimaryContext::attribute(int which, int fallback) const {
  int value = 0;
  return driver_.cuDeviceGetAttribute(&value, which, device_) == kSuccess ? value : fallback;
}

void PrimaryContext::check(Result result, const char* call, const char* file, int line) const {
  if (result == kSuccess) return;
  const char* name = std::strrchr(file, '/');
  const std::string words = std::string(call) + " failed with " + driver_.words(result) + " (" +
                            (name ? name + 1 : file) + ":" + std::to_string(line) + ")";
  if (!is_sticky(result)) throw TransferError(words);
  on_sticky_(words);
  throw DeviceFailed(words);
}

void PrimaryContext::note(Result result) const noexcept {
  if (is_sticky(result)) on_sticky_("a call of the CUDA driver failed with " + driver_.words(result));
}

PrimaryContext::Current::Current(const PrimaryContext& context) : context_(context) {
  CUDA_CALL(context_, cuCtxPushCurrent, context_.context_);
}

PrimaryContext::Current::~Current() {
  Context former = nullptr;
  context_.note(context_.driver().cuCtxPopCurrent(&former));
}

}  // namespace computron::cuda
