// The digest of a page: XXH64 of every 4 KiB leaf, then XXH64 of the leaves' digests with seeds 0 and 1.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace computron {

constexpr size_t kLeafBytes = 4096;

// Two little-endian 64-bit values, seed 0 first.
using Digest = std::array<unsigned char, 16>;

uint64_t xxh64(const void* data, size_t nbytes, uint64_t seed);

inline size_t leaf_count(size_t nbytes) { return (nbytes + kLeafBytes - 1) / kLeafBytes; }

// XXH64 of each leaf, into leaf_count(nbytes) values.
void digest_leaves(const void* data, size_t nbytes, uint64_t* leaves);

Digest digest_of_leaves(const std::vector<uint64_t>& leaves);

Digest page_digest(const void* data, size_t nbytes);

}  // namespace computron
