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
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

namespace computron {
namespace {

void touch_part(char* start, size_t nbytes, bool collapse) {
  if (collapse && nbytes == kHugePage) {
    // There must be a page to collapse. Where this fails the small pages that follow do as well, only slower.
    __atomic_fetch_or(start, 0, __ATOMIC_RELAXED);
    madvise(start, nbytes, MADV_COLLAPSE);
  }
  if (madvise(start, nbytes, MADV_POPULATE_WRITE) == 0) return;
  COMPUTRON_CHECK(errno == EINVAL, "not enough memory");
  const auto page = static_cast<size_t>(getpagesize());
  for (size_t offset = 0; offset < nbytes; offset += page) {
    __atomic_fetch_or(start + offset, 0, __ATOMIC_RELAXED);
  }
}

}  // namespace

void touch(void* address, size_t nbytes, size_t threads, bool collapse) {
  const size_t parts = (nbytes + kHugePage - 1) / kHugePage;
  threads = std::clamp<size_t>(threads, 1, std::max<size_t>(parts, 1));
  std::vector<Failure> failures(threads);
  const auto work = [&](size_t index) {
    try {
      for (size_t part = parts * index / threads; part < parts * (index + 1) / threads; ++part) {
        const size_t offset = part * kHugePage;
        touch_part(static_cast<char*>(address) + offset, std::min(kHugePage, nbytes - offset), collapse);
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
