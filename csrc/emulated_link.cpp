#include "emulated_link.hpp"

#include <sys/prctl.h>

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
  // Without this a sleep may end 50 us late. Spinning instead would take a core from those who compute meanwhile.
  thread_local const int slack = prctl(PR_SET_TIMERSLACK, 1000UL, 0UL, 0UL, 0UL);
  static_cast<void>(slack);
  std::this_thread::sleep_until(time);
}

}  // namespace computron
