#include "streaming_copy.hpp"

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace computron {

#ifdef __SSE2__

namespace {

constexpr size_t kLine = 64;
constexpr size_t kPage = 4096;
constexpr size_t kPages = 4;  // copied side by side: more memory banks at work
constexpr size_t kPrefetch = 4 * kLine;

void stream_line(char* target, const char* source) {
  _mm_prefetch(source + kPrefetch, _MM_HINT_T0);
  const auto* const from = reinterpret_cast<const __m128i*>(source);
  auto* const to = reinterpret_cast<__m128i*>(target);
  const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
  const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
  _mm_stream_si128(to, a);
  _mm_stream_si128(to + 1, b);
  _mm_stream_si128(to + 2, c);
  _mm_stream_si128(to + 3, d);
}

}  // namespace

void streaming_copy(void* target, const void* source, size_t nbytes) {
  auto* to = static_cast<char*>(target);
  const auto* from = static_cast<const char*>(source);
  const size_t unaligned = (kLine - reinterpret_cast<uintptr_t>(to) % kLine) % kLine;
  if (nbytes >= kPages * kPage + unaligned) {
    std::memcpy(to, from, unaligned);
    to += unaligned;
    from += unaligned;
    nbytes -= unaligned;
    for (; nbytes >= kPages * kPage; nbytes -= kPages * kPage, to += kPages * kPage, from += kPages * kPage) {
      for (size_t line = 0; line < kPage; line += kLine) {
        for (size_t page = 0; page < kPages * kPage; page += kPage) stream_line(to + page + line, from + page + line);
      }
    }
    _mm_sfence();
  }
  std::memcpy(to, from, nbytes);
}

#else

void streaming_copy(void* target, const void* source, size_t nbytes) { std::memcpy(target, source, nbytes); }

#endif

}  // namespace computron
