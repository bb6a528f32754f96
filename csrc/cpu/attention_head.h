// Softmax attention of one head over one sequence of rows at any positions; temporal and spatial attention call it for
// each head and sequence. It is compiled once per instruction set; the set is chosen at run time.
//
//   S = q·kᵀ/√E,  P = softmax(S),  out = P·v                                    q, k, v, out [n, E]
//   dv = Pᵀ·do,  dP = do·vᵀ,  dS = P ∘ (dP - rowsum(P ∘ dP)),  dq = dS·k/√E,  dk = dSᵀ·q/√E
#pragma once

#include <cstdint>

#include "../common.h"

namespace bt {

// One head of one video in a tensor with any strides: the vector of row r starts at start + r*row. In a packed tensor k
// and v follow q at a distance of `part` and 2*`part`.
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
  A* first_out;  // [E] receives the first row of the result, unrounded, in place of out; or null
  A* scratch;    // forward_scratch(n, E) elements, aligned to kScratchAlignment bytes
};

template <typename T>
struct HeadBackward {
  using A = accumulate_t<T>;
  int64_t count, width;
  const int64_t* rows;
  HeadRows<const T> qkv, grad;
  HeadRows<T> grad_qkv;
  const A* lse;         // [n], or null: recomputed
  const A* first_grad;  // [E] gradient of the first row, in place of grad's; or null
  A* first_grad_qkv;    // [3, E] receives the first row's gradients, unrounded, in place of grad_qkv; or null
  A* scratch;           // backward_scratch(n, E) elements, aligned to kScratchAlignment bytes
};

template <typename T>
void attention_head(const HeadForward<T>& head);
template <typename T>
void attention_head(const HeadBackward<T>& head);

constexpr int64_t kScratchAlignment = 64;
constexpr int64_t kQueryBlock = 64;  // queries processed together

// Rows and columns of work matrices are padded to a multiple of this: whole vectors of any instruction set.
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
