#include "host_pool.hpp"

#include <algorithm>
#include <cstring>
#include <thread>

#include "touch.hpp"

namespace computron {
namespace {

constexpr int kReserve = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

class HostReservation : public Reservation {
 public:
  HostReservation(HostBackend& backend, int memory, size_t frame_bytes, size_t slots)
      : backend_(backend), memory_(memory), frame_bytes_(frame_bytes) {
    void* const base = mmap(nullptr, slots * frame_bytes, PROT_NONE, kReserve, -1, 0);
    COMPUTRON_CHECK(base != MAP_FAILED, "reserving an address range failed");
    range_ = Mapping(base, slots * frame_bytes);
  }

  uint64_t address() const override { return reinterpret_cast<uint64_t>(range_.address()); }

  void map(size_t slot, const int64_t* frames, size_t count) override {
    size_t done = 0;
    try {
      while (done < count) {
        size_t run = 1;
        while (done + run < count && frames[done + run] == frames[done] + static_cast<int64_t>(run)) ++run;
        map_run(slot + done, frames[done], run);
        done += run;
      }
    } catch (const TransferError&) {
      if (done > 0) unmap(slot, done);
      throw;
    }
  }

  void unmap(size_t slot, size_t count) override {
    void* const place = range_.address() + slot * frame_bytes_;
    void* const mapped = mmap(place, count * frame_bytes_, PROT_NONE, kReserve | MAP_FIXED, -1, 0);
    COMPUTRON_CHECK(mapped == place, "unmapping frames failed");
  }

 private:
  void map_run(size_t slot, int64_t frame, size_t count) {
    backend_.strike("map");
    void* const place = range_.address() + slot * frame_bytes_;
    void* const mapped =
        mmap(place, count * frame_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_POPULATE, memory_,
             static_cast<off_t>(static_cast<size_t>(frame) * frame_bytes_));
    COMPUTRON_CHECK(mapped == place, "mapping frames failed");
  }

  HostBackend& backend_;
  const int memory_;
  const size_t frame_bytes_;
  Mapping range_;
};

FileDescriptor create_memory(size_t nbytes) {
  FileDescriptor memory(memfd_create("computron-device", MFD_CLOEXEC));
  COMPUTRON_CHECK(memory.get() >= 0, "creating device memory failed");
  COMPUTRON_CHECK(ftruncate(memory.get(), static_cast<off_t>(nbytes)) == 0, "sizing device memory failed");
  return memory;
}

}  // namespace

HostPool::HostPool(HostBackend& backend, size_t frame_bytes, size_t frames)
    : backend_(backend), frame_bytes_(frame_bytes), memory_(create_memory(frame_bytes * frames)) {
  const size_t nbytes = frame_bytes * frames;
  // Huge pages need an aligned place, which a mapping of the file alone would not get.
  void* const reserved = mmap(nullptr, nbytes + kHugePage, PROT_NONE, kReserve, -1, 0);
  COMPUTRON_CHECK(reserved != MAP_FAILED, "reserving device memory failed");
  reserved_ = Mapping(reserved, nbytes + kHugePage);
  linear_ = reserved_.address() + (kHugePage - reinterpret_cast<uintptr_t>(reserved) % kHugePage) % kHugePage;
  const void* const linear = mmap(linear_, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory_.get(), 0);
  COMPUTRON_CHECK(linear == linear_, "mapping device memory failed");
  touch(linear_, nbytes, std::clamp(std::thread::hardware_concurrency(), 1U, 8U), true);
}

std::unique_ptr<Reservation> HostPool::reserve(size_t slots) {
  backend_.ensure_alive();
  return std::make_unique<HostReservation>(backend_, memory_.get(), frame_bytes_, slots);
}

void HostPool::read(uint64_t offset, void* target, size_t nbytes) {
  backend_.ensure_alive();
  const auto end = backend_.link(Direction::kToHost).send(nbytes, EmulatedLink::Clock::now());
  std::memcpy(target, linear_ + offset, nbytes);
  EmulatedLink::wait_until(end);
}

void HostPool::write(uint64_t offset, const void* source, size_t nbytes) {
  backend_.ensure_alive();
  const auto end = backend_.link(Direction::kToDevice).send(nbytes, EmulatedLink::Clock::now());
  std::memcpy(linear_ + offset, source, nbytes);
  EmulatedLink::wait_until(end);
}

Digest HostPool::digest(uint64_t offset, size_t nbytes) {
  backend_.ensure_alive();
  return page_digest(linear_ + offset, nbytes);
}

}  // namespace computron
