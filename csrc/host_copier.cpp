#include "host_copier.hpp"

#include "streaming_copy.hpp"

namespace computron {
namespace {

class HostTicket : public Ticket {
 public:
  HostTicket(HostBackend& backend, Direction direction, const Copy& copy)
      : backend_(backend),
        direction_(direction),
        copy_(copy),
        leaves_link_(backend.link(direction).send(copy.nbytes, copy.ready)) {}

  void wait() override {
    backend_.strike_device();
    void* const device = reinterpret_cast<void*>(copy_.device);
    if (direction_ == Direction::kToDevice) {
      streaming_copy(device, copy_.host, copy_.nbytes);
    } else {
      streaming_copy(copy_.host, device, copy_.nbytes);
    }
    EmulatedLink::wait_until(leaves_link_);
  }

  void make_wait(uint64_t) override { throw std::logic_error("host memory has no streams"); }

 private:
  HostBackend& backend_;
  const Direction direction_;
  const Copy copy_;
  const EmulatedLink::Clock::time_point leaves_link_;
};

}  // namespace

std::shared_ptr<Ticket> HostCopier::submit(const Copy& copy) {
  backend_.strike("copy");
  return std::make_shared<HostTicket>(backend_, direction_, copy);
}

}  // namespace computron
