#include "cuda_owned.hpp"

namespace computron::cuda {

OwnedStream create_stream(const PrimaryContext& context) {
  const PrimaryContext::Current current(context);
  Stream stream = nullptr;
  CUDA_CALL(context, cuStreamCreate, &stream, kStreamNonBlocking);
  return OwnedStream(context, stream);
}

OwnedEvent create_event(const PrimaryContext& context) {
  const PrimaryContext::Current current(context);
  Event event = nullptr;
  CUDA_CALL(context, cuEventCreate, &event, kEventBlockingSync | kEventDisableTiming);
  return OwnedEvent(context, event);
}

}  // namespace computron::cuda
