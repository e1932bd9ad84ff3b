#include "host_copier.hpp"

#include <cstring>

namespace computron {

class HostTicket : public Ticket {
 public:
  explicit HostTicket(EmulatedLink::Clock::time_point leaves_link) : leaves_link_(leaves_link) {}

  void wait() override {
    std::unique_lock lock(mutex_);
    copied_.wait(lock, [this] { return done_; });
    if (!failure_.message.empty()) rethrow(failure_);
    lock.unlock();
    EmulatedLink::wait_until(leaves_link_);
  }

  void make_wait(uint64_t) override { wait(); }

  void end(const Failure& failure) {
    std::lock_guard lock(mutex_);
    failure_ = failure;
    done_ = true;
    copied_.notify_all();
  }

 private:
  const EmulatedLink::Clock::time_point leaves_link_;
  std::mutex mutex_;
  std::condition_variable copied_;
  bool done_ = false;
  Failure failure_;
};

HostCopier::HostCopier(HostBackend& backend, Direction direction, size_t threads)
    : backend_(backend), direction_(direction) {
  for (size_t index = 0; index < threads; ++index) threads_.emplace_back([this] { run(); });
}

HostCopier::~HostCopier() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

std::shared_ptr<Ticket> HostCopier::submit(const Copy& copy) {
  backend_.strike("copy");
  auto ticket = std::make_shared<HostTicket>(backend_.link(direction_).send(copy.nbytes, copy.ready));
  {
    std::lock_guard lock(mutex_);
    queue_.push_back({copy, ticket});
  }
  wake_.notify_one();
  return ticket;
}

void HostCopier::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    const Job job = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    carry_out(job);
    lock.lock();
  }
}

void HostCopier::carry_out(const Job& job) {
  Failure failure;
  try {
    backend_.strike_device();
    void* const device = reinterpret_cast<void*>(job.copy.device);
    if (direction_ == Direction::kToDevice) {
      std::memcpy(device, job.copy.host, job.copy.nbytes);
    } else {
      std::memcpy(job.copy.host, device, job.copy.nbytes);
    }
  } catch (const TransferError&) {
    failure = current_failure();
  }
  job.ticket->end(failure);
}

}  // namespace computron
