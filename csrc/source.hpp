// Where the bytes of a page come from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace computron {

class Source {
 public:
  enum class Kind { kPinned, kPageable, kFile };

  // `nbytes` bytes at `offset` of the page are in file `descriptor` at `position`.
  struct Extent {
    uint64_t offset;
    uint64_t nbytes;
    int descriptor;
    uint64_t position;
  };

  static Source pinned(uint64_t address) { return Source(Kind::kPinned, address, {}); }
  static Source pageable(uint64_t address) { return Source(Kind::kPageable, address, {}); }
  // `keep`: where the page's bytes shall stay, 0 if nowhere. Throws std::invalid_argument if extents overlap.
  static Source file(std::vector<Extent> extents, uint64_t keep);

  Kind kind() const { return kind_; }
  // The page in memory: itself, or (file) the place to keep it; null if there is none.
  char* address() const { return reinterpret_cast<char*>(address_); }
  // Bytes [offset, offset + nbytes) of the page into `target`. Throws TransferError if a file is shorter.
  void fill(char* target, size_t offset, size_t nbytes) const;

 private:
  Source(Kind kind, uint64_t address, std::vector<Extent> extents)
      : kind_(kind), address_(address), extents_(std::move(extents)) {}

  Kind kind_;
  uint64_t address_;
  std::vector<Extent> extents_;  // by offset
};

}  // namespace computron
