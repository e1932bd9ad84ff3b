// The time that a link of given bandwidth and latency would take, without the link.
#pragma once

#include <chrono>
#include <cstddef>
#include <mutex>

namespace computron {

class EmulatedLink {
 public:
  using Clock = std::chrono::steady_clock;

  // Bytes a second (0: without bound), seconds a chunk.
  EmulatedLink(double bandwidth, double latency);

  // When a chunk that could enter the link at `ready` leaves it. Chunks queue up behind each other, and a link with
  // work at hand is never idle, so late wake-ups of whoever sends or waits do not add up.
  Clock::time_point send(size_t nbytes, Clock::time_point ready);

  // Sleeps almost until `time`, then spins.
  static void wait_until(Clock::time_point time);

 private:
  const double bandwidth_;
  const double latency_;
  std::mutex mutex_;
  Clock::time_point free_at_{};
};

}  // namespace computron
