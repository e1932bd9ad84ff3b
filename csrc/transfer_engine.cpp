#include "transfer_engine.hpp"

#include <sys/eventfd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace computron {

TransferEngine::TransferEngine(std::shared_ptr<DevicePool> pool, size_t chunk_bytes, size_t depth,
                               size_t staging_chunks)
    : event_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  COMPUTRON_CHECK(event_.get() >= 0, "creating an eventfd failed");
  if (chunk_bytes == 0 || depth == 0 || staging_chunks == 0) {
    throw std::invalid_argument("chunk_bytes, depth and staging_chunks must be positive");
  }
  const auto on_end = [this](std::shared_ptr<Transfer> transfer) { add(std::move(transfer)); };
  chunk_bytes = std::min(chunk_bytes, pool->frame_bytes());
  to_device_ =
      std::make_shared<Lane>(pool, LaneOptions{Direction::kToDevice, chunk_bytes, depth, staging_chunks}, on_end);
  to_host_ = std::make_shared<Lane>(pool, LaneOptions{Direction::kToHost, chunk_bytes, depth, 0}, on_end);
}

TransferEngine::~TransferEngine() { close(); }

std::shared_ptr<Transfer> TransferEngine::submit(Direction direction, TransferRequest request) {
  return lane(direction).submit(std::move(request), ++sequence_);
}

void TransferEngine::add(std::shared_ptr<Transfer> transfer) {
  std::lock_guard lock(mutex_);
  ended_.push_back(std::move(transfer));
  const uint64_t one = 1;
  // Cannot fail: the counter is far from its end, and the mutex keeps it in step with the list.
  [[maybe_unused]] const ssize_t written = write(event_.get(), &one, sizeof one);
}

std::vector<std::shared_ptr<Transfer>> TransferEngine::completions() {
  std::lock_guard lock(mutex_);
  uint64_t count = 0;
  const ssize_t got = read(event_.get(), &count, sizeof count);
  COMPUTRON_CHECK(got == sizeof count || errno == EAGAIN, "reading the eventfd failed");
  return std::exchange(ended_, {});
}

void TransferEngine::close() {
  to_device_->close();
  to_host_->close();
}

}  // namespace computron
