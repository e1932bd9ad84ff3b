#include "emulated_link.hpp"

#include <algorithm>
#include <thread>

namespace computron {

EmulatedLink::EmulatedLink(double bandwidth, double latency) : bandwidth_(bandwidth), latency_(latency) {}

EmulatedLink::Clock::time_point EmulatedLink::send(size_t nbytes, Clock::time_point ready) {
  const double seconds = latency_ + (bandwidth_ > 0 ? static_cast<double>(nbytes) / bandwidth_ : 0);
  std::lock_guard lock(mutex_);
  free_at_ =
      std::max(free_at_, ready) + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  return free_at_;
}

void EmulatedLink::wait_until(Clock::time_point time) {
  constexpr auto kSpin = std::chrono::microseconds(60);  // what a sleep may oversleep by
  const auto sleep_end = time - kSpin;
  if (Clock::now() < sleep_end) std::this_thread::sleep_until(sleep_end);
  while (Clock::now() < time) {
  }
}

}  // namespace computron
