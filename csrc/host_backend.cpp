#include "host_backend.hpp"

#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <stdexcept>

#include "host_copier.hpp"
#include "host_pool.hpp"

namespace computron {

HostBackend::HostBackend(double bandwidth, double latency, size_t copy_threads)
    : bandwidth_(bandwidth), copy_threads_(copy_threads), to_device_(bandwidth, latency), to_host_(bandwidth, latency) {
  if (bandwidth < 0 || latency < 0) throw std::invalid_argument("a link's bandwidth and latency cannot be negative");
  if (copy_threads == 0) throw std::invalid_argument("at least one copy thread is needed");
}

std::string HostBackend::device_name() const {
  if (bandwidth_ == 0) return "host memory";
  char name[64];
  std::snprintf(name, sizeof name, "host memory behind an emulated link of %.3g GB/s", bandwidth_ / 1e9);
  return name;
}

size_t HostBackend::granularity() const { return static_cast<size_t>(getpagesize()); }

size_t HostBackend::free_memory() const {
  std::ifstream info("/proc/meminfo");
  std::string name;
  size_t kibibytes = 0;
  while (info >> name >> kibibytes) {
    if (name == "MemAvailable:") return kibibytes * 1024;
    info.ignore(64, '\n');
  }
  throw TransferError("/proc/meminfo does not tell how much memory is available");
}

void HostBackend::inject_fault(const std::string& operation, uint64_t after, const std::string& message) {
  Faults::require(operation);
  faults_.inject(operation, after, message);
}

void HostBackend::strike(const std::string& operation) {
  ensure_alive();
  if (const auto message = faults_.strike(operation)) throw TransferError(*message);
}

void HostBackend::strike_device() {
  if (const auto message = faults_.strike("device")) mark_failed(*message);
  ensure_alive();
}

std::unique_ptr<PoolMemory> HostBackend::create_pool(size_t frame_bytes, size_t frames) {
  strike("create");
  return std::make_unique<HostPool>(*this, frame_bytes, frames);
}

std::unique_ptr<Copier> HostBackend::create_copier(Direction direction) {
  return std::make_unique<HostCopier>(*this, direction);
}

}  // namespace computron
