// A lane for each direction, and word of what has ended.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "lane.hpp"
#include "owned.hpp"

namespace computron {

class TransferEngine {
 public:
  TransferEngine(std::shared_ptr<DevicePool> pool, size_t chunk_bytes, size_t depth, size_t staging_chunks);
  ~TransferEngine();
  TransferEngine(const TransferEngine&) = delete;
  TransferEngine& operator=(const TransferEngine&) = delete;

  std::shared_ptr<Transfer> submit(Direction direction, TransferRequest request);
  // An eventfd, readable while there are completions to collect.
  int completions_fd() const { return event_.get(); }
  std::vector<std::shared_ptr<Transfer>> completions();
  LaneStatistics statistics(Direction direction) const { return lane(direction).statistics(); }
  void close();

 private:
  void add(std::shared_ptr<Transfer> transfer);
  Lane& lane(Direction direction) const { return direction == Direction::kToDevice ? *to_device_ : *to_host_; }

  const FileDescriptor event_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Transfer>> ended_;
  // They report to this object until they are closed.
  std::shared_ptr<Lane> to_device_;
  std::shared_ptr<Lane> to_host_;
  std::atomic<uint64_t> sequence_{0};
};

}  // namespace computron
