// Device memory, addresses and host memory.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>

#include "standin.hpp"

namespace standin {
namespace {

// Frames live in one memfd. A frame's memory goes back once its handle is released and nothing maps it.
struct Allocation {
  off_t offset;
  size_t nbytes;
  size_t mappings = 0;
  bool released = false;
};

struct Mapped {
  size_t nbytes;
  AllocationHandle handle;
  bool accessible = false;
};

struct Memory {
  std::mutex mutex;
  int file = memfd_create("computron-standin", MFD_CLOEXEC);
  off_t end = 0;
  size_t used = 0;
  std::multimap<size_t, off_t> holes;
  AllocationHandle next_handle = 1;
  std::map<AllocationHandle, Allocation> allocations;
  std::map<DevicePointer, size_t> reserved;
  std::map<DevicePointer, Mapped> mapped;
  std::map<const char*, size_t> registered;
  std::map<DevicePointer, size_t> plain;  // cuMemAlloc

  static Memory& instance() {
    static Memory* const memory = new Memory;
    return *memory;
  }

  size_t limit() const { return static_cast<size_t>(setting("COMPUTRON_STANDIN_MEMORY", 1L << 30)); }

  void free_if_unused(std::map<AllocationHandle, Allocation>::iterator found) {
    const Allocation& allocation = found->second;
    if (!allocation.released || allocation.mappings > 0) return;
    fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, allocation.offset,
              static_cast<off_t>(allocation.nbytes));
    holes.emplace(allocation.nbytes, allocation.offset);
    used -= allocation.nbytes;
    allocations.erase(found);
  }

  // The whole mappings that make up the range exactly; empty if it is not made up of whole ones.
  std::vector<std::map<DevicePointer, Mapped>::iterator> pieces(DevicePointer pointer, size_t nbytes) {
    std::vector<std::map<DevicePointer, Mapped>::iterator> found;
    DevicePointer at = pointer;
    while (at < pointer + nbytes) {
      const auto piece = mapped.find(at);
      if (piece == mapped.end()) return {};
      found.push_back(piece);
      at += piece->second.nbytes;
    }
    if (at != pointer + nbytes) return {};
    return found;
  }
};

void* to_address(DevicePointer pointer) { return reinterpret_cast<void*>(pointer); }

constexpr int kReserve = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

}  // namespace

bool is_accessible(DevicePointer pointer, size_t nbytes) {
  Memory& memory = Memory::instance();
  std::lock_guard lock(memory.mutex);
  const auto block = memory.plain.upper_bound(pointer);
  if (block != memory.plain.begin()) {
    const auto& [start, size] = *std::prev(block);
    if (pointer + nbytes <= start + size) return true;
  }
  DevicePointer at = pointer;
  while (at < pointer + nbytes) {
    auto piece = memory.mapped.upper_bound(at);
    if (piece == memory.mapped.begin()) return false;
    --piece;
    if (at >= piece->first + piece->second.nbytes || !piece->second.accessible) return false;
    at = piece->first + piece->second.nbytes;
  }
  return true;
}

bool is_registered(const void* address, size_t nbytes) {
  Memory& memory = Memory::instance();
  std::lock_guard lock(memory.mutex);
  const auto* const first = static_cast<const char*>(address);
  const auto after = memory.registered.upper_bound(first);
  if (after == memory.registered.begin()) return false;
  const auto& [start, size] = *std::prev(after);
  return first + nbytes <= start + size;
}

}  // namespace standin

using namespace standin;

extern "C" {

Result cuMemGetInfo(size_t* free, size_t* total) {
  if (const Result result = StandinDevice::instance().ready()) return result;
  Memory& memory = Memory::instance();
  std::lock_guard lock(memory.mutex);
  *total = memory.limit();
  *free = *total - memory.used;
  return kSuccess;
}

Result cuMemAlloc(DevicePointer* pointer, size_t nbytes) {
  if (const Result result = StandinDevice::instance().ready()) return result;
  void* const address = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) return kOutOfMemory;
  Memory& memory = Memory::instance();
  std::lock_guard lock(memory.mutex);
  *pointer = reinterpret_cast<DevicePointer>(address);
  memory.plain[*pointer] = nbytes;
  ++Counters::instance().allocations;
  return kSuccess;
}

Result cuMemFree(DevicePointer pointer) {
  Memory& memory = Memory::instance();
  std::lock_guard lock(memory.mutex);
  const auto found = memory.plain.find(pointer);
  if (found == memory.plain.end()) return kInvalidValue;
  munmap(to_address(pointer), found->second);
  memory.plain.erase(found);
  --Counters::instance().allocations;
  return kSuccess;
}

Result cuMemGetAllocationGranularity(size_t* nbytes, const AllocationProperties*, int) {
  *nbytes = kGranularity;
  return kSuccess;
}

Result cuMemCreate(AllocationHandle* handle, size_t nbytes, const AllocationProperties* properties,
                   unsigned long long) {
  if (const Result result = StandinDevice::instance().ready()) return result;
  if (const Result result = StandinDevice::instance().strike("create")) return result;
  if (nbytes == 0 || nbytes % kGranularity != 0 || properties->type != kAllocationTypePinned) return kInvalidValue;
  Memory& memory = Memory::instance();
  std::lock_guard lock(memory.mutex);
  if (memory.used + nbytes > memory.limit()) return kOutOfMemory;
  off_t offset = memory.end;
  const auto hole = memory.holes.find(nbytes);
  if (hole != memory.holes.end()) {
    offset = hole->second;
    memory.holes.erase(hole);
  } else {
    memory.end += static_cast<off_t>(nbytes);
    if (ftruncate(memory.file, memory.end) != 0) return kOutOfMemory;
  }
  *handle = memory.next_handle++;
  memory.allocations[*handle] = {offset, nbytes};
  memory.used += nbytes;
  ++Counters::instance().allocations;
  return kSuccess;
}

Result cuMemRelease(AllocationHandle handle) {
  Memory& memory = Memory::instance();
  std::lock_guard lock(memory.mutex);
  const auto found = memory.allocations.find(handle);
  if (found == memory.allocations.end() || found->second.released) return kInvalidValue;
  found->second.released = true;
  memory.free_if_unused(found);
  --Counters::instance().allocations;
  return kSuccess;
}

Result cuMemAddressReserve(DevicePointer* pointer, size_t nbytes, size_t, DevicePointer, unsigned long long) {
  if (const Result result = StandinDevice::instance().status()) return result;
  if (nbytes == 0 || nbytes % kGranularity != 0) return kInvalidValue;
  void* const address = mmap(nullptr, nbytes, PROT_NONE, kReserve, -1, 0);
  if (address == MAP_FAILED) return kOutOfMemory;
  Memory& memory = Memory::instance();
  std::lock_guard lock(memory.mutex);
  *pointer = reinterpret_cast<DevicePointer>(address);
  memory.reserved[*pointer] = nbytes;
  return kSuccess;
}

Result cuMemAddressFree(DevicePointer pointer, size_t nbytes) {
  Memory& memory = Memory::instance();
  std::lock_guard lock(memory.mutex);
  const auto found = memory.reserved.find(pointer);
  if (found == memory.reserved.end() || found->second != nbytes) return kInvalidValue;
  const auto inside = memory.mapped.lower_bound(pointer);
  if (inside != memory.mapped.end() && inside->first < pointer + nbytes) return kInvalidValue;
  memory.reserved.erase(found);
  munmap(to_address(pointer), nbytes);
  return kSuccess;
}

Result cuMemMap(DevicePointer pointer, size_t nbytes, size_t offset, AllocationHandle handle, unsigned long long) {
  if (const Result result = StandinDevice::instance().status()) return result;
  if (const Result result = StandinDevice::instance().strike("map")) return result;
  Memory& memory = Memory::instance();
  std::lock_guard lock(memory.mutex);
  const auto range = memory.reserved.upper_bound(pointer);
  const auto allocation = memory.allocations.find(handle);
  if (range == memory.reserved.begin() || allocation == memory.allocations.end() || offset != 0) return kInvalidValue;
  const auto& [start, size] = *std::prev(range);
  if (pointer + nbytes > start + size || nbytes != allocation->second.nbytes) return kInvalidValue;
  if (memory.mapped.count(pointer)) return kInvalidValue;
  memory.mapped[pointer] = {nbytes, handle};
  ++allocation->second.mappings;
  ++Counters::instance().mappings;
  return kSuccess;
}

Result cuMemSetAccess(DevicePointer pointer, size_t nbytes, const AccessDescription* access, size_t count) {
  if (const Result result = StandinDevice::instance().status()) return result;
  if (count != 1 || access->flags != kAccessReadWrite) return kInvalidValue;
  Memory& memory = Memory::instance();
  std::lock_guard lock(memory.mutex);
  const auto pieces = memory.pieces(pointer, nbytes);
  if (pieces.empty()) return kInvalidValue;
  for (const auto& piece : pieces) {
    const Allocation& allocation = memory.allocations.at(piece->second.handle);
    void* const place = to_address(piece->first);
    const void* const mapped =
        mmap(place, allocation.nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory.file, allocation.offset);
    if (mapped != place) return kOutOfMemory;
    piece->second.accessible = true;
  }
  return kSuccess;
}

Result cuMemUnmap(DevicePointer pointer, size_t nbytes) {
  Memory& memory = Memory::instance();
  std::lock_guard lock(memory.mutex);
  const auto pieces = memory.pieces(pointer, nbytes);
  if (pieces.empty()) return kInvalidValue;
  mmap(to_address(pointer), nbytes, PROT_NONE, kReserve | MAP_FIXED, -1, 0);
  for (const auto& piece : pieces) {
    const auto allocation = memory.allocations.find(piece->second.handle);
    --allocation->second.mappings;
    memory.free_if_unused(allocation);
    memory.mapped.erase(piece);
    --Counters::instance().mappings;
  }
  return kSuccess;
}

Result cuMemHostRegister(void* address, size_t nbytes, unsigned) {
  if (const Result result = StandinDevice::instance().ready()) return result;
  if (is_registered(address, 1)) return kInvalidValue;
  Memory& memory = Memory::instance();
  std::lock_guard lock(memory.mutex);
  memory.registered[static_cast<const char*>(address)] = nbytes;
  ++Counters::instance().registered;
  return kSuccess;
}

Result cuMemHostUnregister(void* address) {
  Memory& memory = Memory::instance();
  std::lock_guard lock(memory.mutex);
  if (memory.registered.erase(static_cast<const char*>(address)) == 0) return kInvalidValue;
  --Counters::instance().registered;
  return kSuccess;
}

}  // extern "C"
