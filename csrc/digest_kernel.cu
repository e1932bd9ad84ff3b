// XXH64 of every leaf of a page. Four threads a leaf, one for each accumulator of XXH64: together they read 32
// neighbouring bytes at a time, a whole memory sector.
#include "xxh64.hpp"

namespace {

constexpr unsigned long long kLeafBytes = 4096;
constexpr unsigned long long kStripe = 32;

}  // namespace

extern "C" __global__ void page_leaves(const unsigned char* page, unsigned long long nbytes, unsigned long long* leaves,
                                       unsigned long long leaf_count) {
  using namespace computron::xxh;
  const unsigned long long thread = blockIdx.x * static_cast<unsigned long long>(blockDim.x) + threadIdx.x;
  const unsigned long long leaf = thread / 4;
  const int lane = static_cast<int>(thread % 4);
  const bool inside = leaf < leaf_count;
  const unsigned char* const bytes = page + leaf * kLeafBytes;
  const unsigned long long left = inside ? nbytes - leaf * kLeafBytes : 0;
  const unsigned long long size = left < kLeafBytes ? left : kLeafBytes;
  const unsigned long long stripes = size / kStripe;

  // Frames are aligned, so are the lane's words.
  const auto* words = reinterpret_cast<const unsigned long long*>(bytes) + lane;
  uint64_t accumulator = start(0, lane);
#pragma unroll 8
  for (unsigned long long stripe = 0; stripe < stripes; ++stripe) {
    accumulator = round(accumulator, words[stripe * 4]);
  }
  uint64_t lanes[4];
  for (int source = 0; source < 4; ++source) lanes[source] = __shfl_sync(0xffffffffu, accumulator, source, 4);
  if (!inside || lane != 0) return;
  const uint64_t hash = size >= kStripe ? converge(lanes[0], lanes[1], lanes[2], lanes[3]) : kPrime5;
  leaves[leaf] = finish(hash + size, bytes + stripes * kStripe, size - stripes * kStripe);
}
