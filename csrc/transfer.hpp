// A job: pages to move between host and device, in order.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "device_pool.hpp"
#include "source.hpp"

namespace computron {

class Lane;

// Smaller goes first.
struct Rank {
  int64_t priority = 0;
  double deadline = std::numeric_limits<double>::infinity();
  uint64_t sequence = 0;

  bool operator<(const Rank& other) const {
    if (priority != other.priority) return priority < other.priority;
    if (deadline != other.deadline) return deadline < other.deadline;
    return sequence < other.sequence;
  }
};

struct TransferRequest {
  std::vector<int64_t> frames;
  std::vector<Source> sources;  // or, to the host, where each page goes
  std::vector<size_t> page_bytes;
  std::vector<size_t> segment_pages;
  int64_t priority = 0;
  double deadline = std::numeric_limits<double>::infinity();
};

class Transfer {
 public:
  enum class State { kQueued, kRunning, kDone, kCancelled, kFailed };

  uint64_t id() const { return rank_sequence_; }
  State state() const { return state_.load(); }
  bool ended() const { return state() > State::kRunning; }
  std::optional<std::string> error() const;
  uint64_t total_bytes() const { return total_bytes_; }
  uint64_t bytes_done() const { return bytes_done_.load(); }
  // From the first chunk to the last, 0 before the end.
  double seconds() const { return seconds_.load(); }
  bool page_done(size_t page) const;
  bool segment_done(size_t segment) const;

  void wait_segment(size_t segment, uint64_t stream);
  // False if the time (seconds) is over first.
  bool wait(std::optional<double> timeout);
  void raise_priority(int64_t priority, double deadline);
  void cancel();

 private:
  friend class Lane;
  using Clock = std::chrono::steady_clock;

  enum class ChunkState : uint8_t { kEmpty, kFilling, kReady, kSent };

  struct Page {
    int64_t frame;
    Source source;
    size_t nbytes;
    size_t segment;
    std::shared_ptr<HostRegion> region;  // keeps the host side mapped until the end
    size_t active = 0;                   // chunks being filled or in flight
    bool pinned = true;                  // in the pool
  };

  struct Chunk {
    size_t page;
    size_t offset;
    size_t nbytes;
    ChunkState state;
    int slot = -1;              // of the staging ring
    Clock::time_point ready{};  // since when it can travel
  };

  struct Segment {
    size_t first_chunk;
    size_t end_chunk;
  };

  Transfer(std::shared_ptr<Lane> lane, TransferRequest&& request, uint64_t sequence);
  void check_segment(size_t segment) const;
  // Throws the error of a job that will not be completed.
  void throw_if_stopped() const;

  const std::shared_ptr<Lane> lane_;  // whose mutex guards everything below that is neither constant nor atomic
  const uint64_t rank_sequence_;
  Rank rank_;
  std::vector<Page> pages_;
  std::vector<Chunk> chunks_;
  std::vector<Segment> segments_;
  uint64_t total_bytes_ = 0;
  std::vector<std::atomic<size_t>> page_chunks_left_;
  std::vector<std::atomic<size_t>> segment_chunks_left_;

  std::atomic<State> state_{State::kQueued};
  std::atomic<uint64_t> bytes_done_{0};
  std::atomic<double> seconds_{0};

  std::condition_variable changed_;
  size_t next_ = 0;          // chunk to send next
  size_t sent_ = 0;          // chunks that have a ticket
  size_t active_ = 0;        // chunks being filled or in flight
  size_t left_ = 0;          // chunks that have not arrived
  size_t fill_next_ = 0;     // no chunk below is empty
  std::set<size_t> filled_;  // chunks in staging slots, ready and not sent
  bool stopped_ = false;     // cancelled or failed: nothing more starts
  State outcome_ = State::kDone;
  Failure failure_;
  Clock::time_point begin_{};
};

}  // namespace computron
