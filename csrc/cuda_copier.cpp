#include "cuda_copier.hpp"

namespace computron {

using cuda::PrimaryContext;

// Events for reuse: making one costs more than recording it.
class CudaCopier::Events {
 public:
  explicit Events(const PrimaryContext& context) : context_(context) {}

  cuda::OwnedEvent take() {
    {
      std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        cuda::OwnedEvent event = std::move(idle_.back());
        idle_.pop_back();
        return event;
      }
    }
    return cuda::create_event(context_);
  }

  void give_back(cuda::OwnedEvent event) {
    std::lock_guard lock(mutex_);
    idle_.push_back(std::move(event));
  }

 private:
  const PrimaryContext& context_;
  std::mutex mutex_;
  std::vector<cuda::OwnedEvent> idle_;
};

class CudaCopier::CudaTicket : public Ticket {
 public:
  CudaTicket(const PrimaryContext& context, std::shared_ptr<Events> events)
      : context_(context), events_(std::move(events)), event_(events_->take()) {}
  ~CudaTicket() override { events_->give_back(std::move(event_)); }

  cuda::Event event() const { return event_.get(); }

  void wait() override {
    const PrimaryContext::Current current(context_);
    CUDA_CALL(context_, cuEventSynchronize, event_.get());
  }

  void make_wait(uint64_t stream) override {
    const PrimaryContext::Current current(context_);
    CUDA_CALL(context_, cuStreamWaitEvent, reinterpret_cast<cuda::Stream>(stream), event_.get(), 0);
  }

 private:
  const PrimaryContext& context_;
  const std::shared_ptr<Events> events_;
  cuda::OwnedEvent event_;
};

CudaCopier::CudaCopier(Backend& backend, const PrimaryContext& context, Direction direction)
    : backend_(backend),
      context_(context),
      direction_(direction),
      pinned_(cuda::create_stream(context)),
      staged_(cuda::create_stream(context)),
      events_(std::make_shared<Events>(context)) {}

CudaCopier::~CudaCopier() = default;

std::shared_ptr<Ticket> CudaCopier::submit(const Copy& copy) {
  backend_.ensure_alive();
  auto ticket = std::make_shared<CudaTicket>(context_, events_);
  const cuda::Stream stream = copy.staged ? staged_.get() : pinned_.get();
  const PrimaryContext::Current current(context_);
  if (direction_ == Direction::kToDevice) {
    CUDA_CALL(context_, cuMemcpyHtoDAsync, copy.device, copy.host, copy.nbytes, stream);
  } else {
    CUDA_CALL(context_, cuMemcpyDtoHAsync, copy.host, copy.device, copy.nbytes, stream);
  }
  try {
    CUDA_CALL(context_, cuEventRecord, ticket->event(), stream);
  } catch (const TransferError&) {
    // The copy is under way without a ticket: the frame must not be given away before it has ended.
    context_.note(context_.driver().cuStreamSynchronize(stream));
    throw;
  }
  return ticket;
}

}  // namespace computron
