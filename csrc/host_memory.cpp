#include "host_memory.hpp"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "touch.hpp"

namespace computron {
namespace {

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// Memory touched from now on comes from `node`: if a user named it, surely; if it is only near the device, if possible.
void bind_to_node(void* address, size_t nbytes, int node, bool named) {
  std::vector<unsigned long> mask(static_cast<size_t>(node) / 64 + 1);
  mask[static_cast<size_t>(node) / 64] = 1UL << (node % 64);
  const int policy = named ? MPOL_BIND : MPOL_PREFERRED;
  const bool bound = syscall(SYS_mbind, address, nbytes, policy, mask.data(), mask.size() * 64 + 1, 0) == 0;
  COMPUTRON_CHECK(bound || !named, "binding host memory to its NUMA node failed");
}

}  // namespace

std::shared_ptr<HostRegion> HostRegion::create(std::shared_ptr<Backend> backend, size_t nbytes, int numa_node,
                                               size_t slab_bytes) {
  std::shared_ptr<HostRegion> region(new HostRegion(backend, nbytes, numa_node, slab_bytes));
  backend->add_region(region);
  return region;
}

HostRegion::HostRegion(std::shared_ptr<Backend> backend, size_t nbytes, int numa_node, size_t slab_bytes)
    : backend_(std::move(backend)),
      nbytes_(nbytes),
      node_is_named_(numa_node >= 0),
      numa_node_(node_is_named_ ? numa_node : backend_->numa_node()),
      slab_bytes_(round_up(slab_bytes ? slab_bytes : kDefaultSlabBytes, static_cast<size_t>(getpagesize()))) {
  if (nbytes == 0) throw std::invalid_argument("a host memory of 0 bytes");
  slabs_.resize((nbytes_ + slab_bytes_ - 1) / slab_bytes_);
  reserved_ = round_up(nbytes_, static_cast<size_t>(getpagesize()));
  void* base = mmap(nullptr, reserved_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  COMPUTRON_CHECK(base != MAP_FAILED, "reserving host memory failed");
  base_ = static_cast<char*>(base);
}

HostRegion::~HostRegion() {
  backend_->remove_region(*this);
  for (size_t slab = 0; slab < slabs_.size(); ++slab) {
    if (slabs_[slab]) backend_->unpin(base_ + slab * slab_bytes_);
  }
  munmap(base_, reserved_);
}

size_t HostRegion::committed() const {
  std::lock_guard lock(mutex_);
  return committed_;
}

size_t HostRegion::slab_end(size_t slab) const { return std::min((slab + 1) * slab_bytes_, reserved_); }

void HostRegion::check_range(size_t offset, size_t nbytes) const {
  if (offset > nbytes_ || nbytes > nbytes_ - offset) {
    throw std::invalid_argument("bytes " + std::to_string(offset) + " to " + std::to_string(offset + nbytes) +
                                " are outside a host memory of " + std::to_string(nbytes_));
  }
}

void HostRegion::commit(size_t offset, size_t nbytes, size_t threads) {
  check_range(offset, nbytes);
  if (nbytes == 0) return;
  std::lock_guard committing(committing_);
  for (size_t slab = offset / slab_bytes_; slab <= (offset + nbytes - 1) / slab_bytes_; ++slab) {
    if (!slabs_[slab]) commit_slab(slab, threads);
  }
}

void HostRegion::commit_slab(size_t slab, size_t threads) {
  char* const start = base_ + slab * slab_bytes_;
  const size_t nbytes = slab_end(slab) - slab * slab_bytes_;
  COMPUTRON_CHECK(mprotect(start, nbytes, PROT_READ | PROT_WRITE) == 0, "committing host memory failed");
  // Huge pages are a wish: kernels without them answer EINVAL.
  madvise(start, nbytes, MADV_HUGEPAGE);
  if (numa_node_ >= 0) bind_to_node(start, nbytes, numa_node_, node_is_named_);
  touch(start, nbytes, threads);
  backend_->pin(start, nbytes);
  std::lock_guard lock(mutex_);
  slabs_[slab] = true;
  committed_ += nbytes;
}

void HostRegion::discard(size_t offset, size_t nbytes) {
  check_range(offset, nbytes);
  if (nbytes == 0 || !backend_->can_discard()) return;
  COMPUTRON_CHECK(madvise(base_ + offset, nbytes, MADV_DONTNEED) == 0, "discarding host memory failed");
}

bool HostRegion::holds(uintptr_t address, size_t nbytes) const {
  const uintptr_t base = this->address();
  if (address < base || nbytes == 0 || address - base + nbytes > nbytes_) return false;
  const size_t first = (address - base) / slab_bytes_;
  if (first != (address - base + nbytes - 1) / slab_bytes_) return false;
  std::lock_guard lock(mutex_);
  return slabs_[first];
}

}  // namespace computron
