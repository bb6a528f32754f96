// Rows that are gathered lie far apart and are about a page long, where the processor's own prefetching ends.
#pragma once

#include <algorithm>
#include <cstdint>

namespace bt {

// body(from, to) for the columns [0, n) of a row, a cache line at a time, asking for the same line of the row that comes
// next. `next` is not read and may be any address.
template <typename T, typename F>
inline void by_line(const T* next, int64_t n, const F& body) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t from = 0; from < n; from += line) {
    __builtin_prefetch(next + from);
    body(from, std::min(n, from + line));
  }
}

}  // namespace bt
