// The arithmetic of XXH64, for the host and for device kernels.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define COMPUTRON_INLINE __host__ __device__ __forceinline__
#else
#define COMPUTRON_INLINE inline
#endif

namespace computron::xxh {

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87ULL;
constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4FULL;
constexpr uint64_t kPrime3 = 0x165667B19E3779F9ULL;
constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63ULL;
constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5ULL;

COMPUTRON_INLINE uint64_t rotate(uint64_t value, int bits) { return (value << bits) | (value >> (64 - bits)); }

COMPUTRON_INLINE uint64_t round(uint64_t accumulator, uint64_t input) {
  return rotate(accumulator + input * kPrime2, 31) * kPrime1;
}

// What accumulator `lane` (0..3) starts from.
COMPUTRON_INLINE uint64_t start(uint64_t seed, int lane) {
  switch (lane) {
    case 0:
      return seed + kPrime1 + kPrime2;
    case 1:
      return seed + kPrime2;
    case 2:
      return seed;
    default:
      return seed - kPrime1;
  }
}

COMPUTRON_INLINE uint64_t converge(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
  uint64_t hash = rotate(a, 1) + rotate(b, 7) + rotate(c, 12) + rotate(d, 18);
  hash = (hash ^ round(0, a)) * kPrime1 + kPrime4;
  hash = (hash ^ round(0, b)) * kPrime1 + kPrime4;
  hash = (hash ^ round(0, c)) * kPrime1 + kPrime4;
  return (hash ^ round(0, d)) * kPrime1 + kPrime4;
}

// Little-endian, at any alignment. Both sides are little-endian machines.
template <typename Word>
COMPUTRON_INLINE uint64_t load(const unsigned char* bytes) {
  Word value;
  memcpy(&value, bytes, sizeof value);
  return value;
}

// The last `nbytes` (under 32) bytes, and the avalanche. `hash` already holds the length.
COMPUTRON_INLINE uint64_t finish(uint64_t hash, const unsigned char* tail, uint64_t nbytes) {
  for (; nbytes >= 8; nbytes -= 8, tail += 8) {
    hash = rotate(hash ^ round(0, load<uint64_t>(tail)), 27) * kPrime1 + kPrime4;
  }
  for (; nbytes >= 4; nbytes -= 4, tail += 4) {
    hash = rotate(hash ^ (load<uint32_t>(tail) * kPrime1), 23) * kPrime2 + kPrime3;
  }
  for (; nbytes > 0; --nbytes, ++tail) hash = rotate(hash ^ (*tail * kPrime5), 11) * kPrime1;
  hash = (hash ^ (hash >> 33)) * kPrime2;
  hash = (hash ^ (hash >> 29)) * kPrime3;
  return hash ^ (hash >> 32);
}

}  // namespace computron::xxh
