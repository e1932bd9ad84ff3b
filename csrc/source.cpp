#include "source.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "error.hpp"
#include "streaming_copy.hpp"

namespace computron {
namespace {

void read_fully(int descriptor, char* target, size_t nbytes, uint64_t position) {
  while (nbytes > 0) {
    const ssize_t got = pread(descriptor, target, nbytes, static_cast<off_t>(position));
    if (got < 0 && errno == EINTR) continue;
    COMPUTRON_CHECK(got >= 0, "reading a page from its file failed");
    if (got == 0) throw TransferError("a file ended at byte " + std::to_string(position) + ", before its page did");
    target += got;
    nbytes -= static_cast<size_t>(got);
    position += static_cast<uint64_t>(got);
  }
}

}  // namespace

Source Source::file(std::vector<Extent> extents, uint64_t keep) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.offset < b.offset; });
  for (size_t index = 1; index < extents.size(); ++index) {
    if (extents[index - 1].offset + extents[index - 1].nbytes > extents[index].offset) {
      throw std::invalid_argument("the extents of a page overlap");
    }
  }
  return Source(Kind::kFile, keep, std::move(extents));
}

void Source::fill(char* target, size_t offset, size_t nbytes) const {
  if (kind_ != Kind::kFile) {
    streaming_copy(target, address() + offset, nbytes);
    return;
  }
  const size_t end = offset + nbytes;
  size_t at = offset;  // up to here `target` is complete
  for (const Extent& extent : extents_) {
    const size_t from = std::max<size_t>(extent.offset, offset);
    const size_t to = std::min<size_t>(extent.offset + extent.nbytes, end);
    if (from >= to) continue;
    std::memset(target + (at - offset), 0, from - at);
    read_fully(extent.descriptor, target + (from - offset), to - from, extent.position + (from - extent.offset));
    at = to;
  }
  std::memset(target + (at - offset), 0, end - at);
}

}  // namespace computron
