#include "digest.hpp"

#include <algorithm>
#include <cstring>

#include "xxh64.hpp"

namespace computron {

uint64_t xxh64(const void* data, size_t nbytes, uint64_t seed) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  const unsigned char* const end = bytes + nbytes;
  uint64_t hash = seed + xxh::kPrime5;
  if (nbytes >= 32) {
    uint64_t a = xxh::start(seed, 0), b = xxh::start(seed, 1), c = xxh::start(seed, 2), d = xxh::start(seed, 3);
    for (; end - bytes >= 32; bytes += 32) {
      a = xxh::round(a, xxh::load<uint64_t>(bytes));
      b = xxh::round(b, xxh::load<uint64_t>(bytes + 8));
      c = xxh::round(c, xxh::load<uint64_t>(bytes + 16));
      d = xxh::round(d, xxh::load<uint64_t>(bytes + 24));
    }
    hash = xxh::converge(a, b, c, d);
  }
  return xxh::finish(hash + nbytes, bytes, static_cast<uint64_t>(end - bytes));
}

void digest_leaves(const void* data, size_t nbytes, uint64_t* leaves) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  for (size_t offset = 0; offset < nbytes; offset += kLeafBytes) {
    *leaves++ = xxh64(bytes + offset, std::min(kLeafBytes, nbytes - offset), 0);
  }
}

Digest digest_of_leaves(const std::vector<uint64_t>& leaves) {
  Digest digest;
  for (uint64_t seed : {0, 1}) {
    const uint64_t hash = xxh64(leaves.data(), leaves.size() * sizeof(uint64_t), seed);
    std::memcpy(digest.data() + seed * sizeof hash, &hash, sizeof hash);
  }
  return digest;
}

Digest page_digest(const void* data, size_t nbytes) {
  std::vector<uint64_t> leaves(leaf_count(nbytes));
  digest_leaves(data, nbytes, leaves.data());
  return digest_of_leaves(leaves);
}

}  // namespace computron
