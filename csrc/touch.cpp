#include "touch.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <thread>
#include <vector>

#include "error.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace computron {
namespace {

void touch_part(char* start, size_t nbytes) {
  if (madvise(start, nbytes, MADV_POPULATE_WRITE) == 0) return;
  COMPUTRON_CHECK(errno == EINVAL, "not enough memory");
  const auto page = static_cast<size_t>(getpagesize());
  for (size_t offset = 0; offset < nbytes; offset += page) {
    __atomic_fetch_or(start + offset, 0, __ATOMIC_RELAXED);
  }
}

}  // namespace

void touch(void* address, size_t nbytes, size_t threads) {
  constexpr size_t kPart = size_t{2} << 20;
  const size_t parts = (nbytes + kPart - 1) / kPart;
  threads = std::clamp<size_t>(threads, 1, std::max<size_t>(parts, 1));
  std::vector<Failure> failures(threads);
  const auto work = [&](size_t index) {
    try {
      for (size_t part = parts * index / threads; part < parts * (index + 1) / threads; ++part) {
        touch_part(static_cast<char*>(address) + part * kPart, std::min(kPart, nbytes - part * kPart));
      }
    } catch (const TransferError&) {
      failures[index] = current_failure();
    }
  };
  std::vector<std::thread> helpers;
  for (size_t index = 1; index < threads; ++index) helpers.emplace_back(work, index);
  work(0);
  for (std::thread& helper : helpers) helper.join();
  for (const Failure& failure : failures) {
    if (!failure.message.empty()) rethrow(failure);
  }
}

}  // namespace computron
