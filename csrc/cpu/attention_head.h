// Softmax attention of one head over one sequence of rows, wherever the rows lie; temporal and spatial attention are
// many of these. Compiled once per instruction set, chosen when called.
//
//   S = q·kᵀ/√E,  P = softmax(S),  out = P·v                                    q, k, v, out [n, E]
//   dv = Pᵀ·do,  dP = do·vᵀ,  dS = P ∘ (dP - rowsum(P ∘ dP)),  dq = dS·k/√E,  dk = dSᵀ·q/√E
#pragma once

#include <cstdint>

#include "../common.h"

namespace bt {

// One head of one video in a tensor of any strides: row r's vector starts at start + r*row; where q, k and v lie
// together, k's and v's follow at distances of `part`.
template <typename P>
struct HeadRows {
  P* start;
  int64_t row, part;

  P* at(int64_t r, int which = 0) const { return start + r * row + which * part; }
};

template <typename T>
struct HeadForward {
  using A = accumulate_t<T>;
  int64_t count, width;  // n, E
  const int64_t* rows;   // [n] rows of the sequence, the same in every tensor
  HeadRows<const T> qkv;
  HeadRows<T> out;
  A* lse;        // [n] log-sum-exp of S, or null
  A* first_out;  // [E] takes the first row of the result unrounded instead of out, or null
  A* scratch;    // forward_scratch(n, E) elements, aligned to kScratchAlignment bytes
};

template <typename T>
struct HeadBackward {
  using A = accumulate_t<T>;
  int64_t count, width;
  const int64_t* rows;
  HeadRows<const T> qkv, grad;
  HeadRows<T> grad_qkv;
  const A* lse;         // [n], or null: computed again
  const A* first_grad;  // [E] the gradient of the first row instead of grad's, or null
  A* first_grad_qkv;    // [3, E] takes the first row's gradients unrounded instead of grad_qkv, or null
  A* scratch;           // backward_scratch(n, E) elements, aligned likewise
};

template <typename T>
void attention_head(const HeadForward<T>& head);
template <typename T>
void attention_head(const HeadBackward<T>& head);

constexpr int64_t kScratchAlignment = 64;
constexpr int64_t kQueryBlock = 64;  // queries handled together

// Rows and columns of work matrices are padded to this many elements, whole vectors of any instruction set.
inline int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }
inline int64_t query_block(int64_t count) { return padded(count) < kQueryBlock ? padded(count) : kQueryBlock; }

// k, v [n, E]; q, its transpose, out [block, E]; P [n, block]; 1/sum [block]
inline int64_t forward_scratch(int64_t count, int64_t width) {
  const int64_t block = query_block(count), wide = padded(width);
  return (2 * count + 3 * block) * wide + (count + 1) * block;
}

// k, v, dk, dv [n, E]; q, do, their transposes, dq [block, E]; P, dP [n, block]; lse or 1/sum [block]
inline int64_t backward_scratch(int64_t count, int64_t width) {
  const int64_t block = query_block(count), wide = padded(width);
  return (4 * count + 5 * block) * wide + (2 * count + 1) * block;
}

}  // namespace bt
