// Attention of one head (attention_head.h), compiled for several instruction sets; the processor's best is called.
//
// Compilers' function multiversioning splits vectors before it makes its versions, so the code is included once per set
// instead. Fused multiply-add is wanted here: results differ by rounding from one set to another, but on one machine
// they depend on nothing else.
#include "attention_head.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "convert.h"

#define BT_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define BT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define BT_UNROLL _Pragma("GCC unroll 16")
#endif
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define BT_HAVE_SHUFFLEVECTOR 1
#endif
#endif

// Vectors are passed between functions of one set alone, always inlined: their calling convention is of no concern.
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(__x86_64__) && !defined(__AVX512F__)
#define BT_SEVERAL_SETS 1
#endif

#if BT_SEVERAL_SETS

#define BT_VECTOR_BYTES 64
#define BT_VECTOR_REGISTERS 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#endif
namespace bt::avx512 {
namespace {
#include "attention_head.inc"
}
}  // namespace bt::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef BT_VECTOR_BYTES
#undef BT_VECTOR_REGISTERS

#define BT_VECTOR_BYTES 32
#define BT_VECTOR_REGISTERS 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace bt::avx2 {
namespace {
#include "attention_head.inc"
}
}  // namespace bt::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef BT_VECTOR_BYTES
#undef BT_VECTOR_REGISTERS

#endif  // BT_SEVERAL_SETS

// What the compiler targets anyway.
#if defined(__AVX512F__)
#define BT_VECTOR_BYTES 64
#define BT_VECTOR_REGISTERS 32
#elif defined(__AVX__)
#define BT_VECTOR_BYTES 32
#define BT_VECTOR_REGISTERS 16
#else
#define BT_VECTOR_BYTES 16
#if defined(__aarch64__)
#define BT_VECTOR_REGISTERS 32
#else
#define BT_VECTOR_REGISTERS 16
#endif
#endif
namespace bt::plain {
namespace {
#include "attention_head.inc"
}
}  // namespace bt::plain

namespace bt {

#if BT_SEVERAL_SETS
namespace {

enum class Set { plain, avx2, avx512 };

Set best_set() {
  static const Set best = [] {
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    return !has_avx2 ? Set::plain : has_avx512 ? Set::avx512 : Set::avx2;
  }();
  return best;
}

// The set for sequences of `count` rows: over very short ones half of the widest vectors' lanes would idle.
template <typename T>
Set set_for(int64_t count) {
  const Set best = best_set();
  const bool is_short = count * static_cast<int64_t>(sizeof(accumulate_t<T>)) <= 32;
  return best == Set::avx512 && is_short ? Set::avx2 : best;
}

}  // namespace
#endif

template <typename T>
void attention_head(const HeadForward<T>& head) {
#if BT_SEVERAL_SETS
  const Set set = set_for<T>(head.count);
  if (set == Set::avx512) return avx512::forward_head(head);
  if (set == Set::avx2) return avx2::forward_head(head);
#endif
  plain::forward_head(head);
}

template <typename T>
void attention_head(const HeadBackward<T>& head) {
#if BT_SEVERAL_SETS
  const Set set = set_for<T>(head.count);
  if (set == Set::avx512) return avx512::backward_head(head);
  if (set == Set::avx2) return avx2::backward_head(head);
#endif
  plain::backward_head(head);
}

#define BT_ATTENTION_HEAD(T)                            \
  template void attention_head(const HeadForward<T>&); \
  template void attention_head(const HeadBackward<T>&);
BT_ATTENTION_HEAD(float)
BT_ATTENTION_HEAD(double)
BT_ATTENTION_HEAD(torch::headeronly::BFloat16)
BT_ATTENTION_HEAD(torch::headeronly::Half)
#undef BT_ATTENTION_HEAD

}  // namespace bt
