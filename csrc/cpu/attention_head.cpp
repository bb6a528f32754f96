// Attention of one head (attention_head.h), compiled for several instruction sets; the best one available is called.
//
// Function multiversioning of compilers splits vectors before it makes the versions, so the code is included once for
// each set instead. It uses fused multiply-add: results differ by rounding between instruction sets, but are
// reproducible on one machine.
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

// Vectors are passed only between functions of one set, which are inlined, so their calling convention does not matter.
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

// The compiler's default target.
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

// Chooses the set for sequences of `count` rows: very short ones would leave half the lanes of the widest vectors idle.
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
