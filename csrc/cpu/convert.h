// Conversions between storage types and the types of sums. The float16 conversions of torch branch, so compilers cannot
// vectorise loops around them; these use masks instead and give the same bits.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "../common.h"

namespace bt {

template <typename T>
inline accumulate_t<T> load(T value) {
  return static_cast<accumulate_t<T>>(value);
}

template <>
inline float load(torch::headeronly::Half value) {
  const uint32_t magnitude = value.x & 0x7fffu, sign = (value.x & 0x8000u) << 16;
  // The bits of a float16, moved to their positions in a float32, mean value * 2^-112, since the biases differ by 112.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t infinite = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | infinite | sign);
}

template <typename T>
inline T store(accumulate_t<T> value) {
  return static_cast<T>(value);
}

template <>
inline torch::headeronly::Half store(float value) {
  const uint32_t all = std::bit_cast<uint32_t>(value), bits = all & 0x7fffffffu, sign = (all >> 16) & 0x8000u;
  // Below 2^-14 results are multiples of 2^-24, the spacing of float32 just above 0.5: adding 0.5 rounds to them.
  const uint32_t tiny = std::bit_cast<uint32_t>(std::bit_cast<float>(bits) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  // 65536, and values that round up to it, become the bits of infinity without a special case.
  const uint32_t most = std::min(bits, 0x47800000u);
  const uint32_t normal = ((most + 0xfffu + ((most >> 13) & 1u)) >> 13) - (112u << 10);
  const uint32_t is_tiny = -static_cast<uint32_t>(bits < 0x38800000u);  // below 2^-14
  const uint32_t not_a_number = -static_cast<uint32_t>(bits > 0x7f800000u) & 0x200u;
  const uint32_t result = (tiny & is_tiny) | (normal & ~is_tiny) | not_a_number;
  return {static_cast<unsigned short>(result | sign), torch::headeronly::Half::from_bits()};
}

}  // namespace bt
