// Shapes and checks of temporal_attention and spatial_attention, shared by all devices.
//
// qkv [B, first+N, 3, H, E] (first = 1 where a CLS row leads, else 0), index [B, N] with entries p*T + t or -1 at the
// end, slots S of a regular grid (row n is step n % S of group n / S) or none when ragged (step t of patch p).
#pragma once

#include "common.h"

namespace bt {

struct AttentionShape {
  int64_t batch, tokens, heads, width, frames;
  int64_t slots;  // 0: ragged
  int64_t first;  // rows before the N tokens

  bool ragged() const { return slots == 0; }
  int64_t rows() const { return first + tokens; }
  int64_t steps() const { return ragged() ? frames : slots; }
};

// Strides of [B, rows, 3, H, E] in elements; the last dimension's is 1.
struct PackedStrides {
  int64_t batch, row, part, head;
};

inline PackedStrides packed_strides(const Tensor& qkv) {
  return {qkv.stride(0), qkv.stride(1), qkv.stride(2), qkv.stride(3)};
}

inline AttentionShape check_attention(const char* op, const Tensor& qkv, const Tensor& index, int64_t first,
                                      int64_t frames, std::optional<int64_t> slots) {
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, op, ": qkv must have 5 dimensions [B, ", first ? "1+N" : "N",
                  ", 3, H, E]");
  STD_TORCH_CHECK(index.dim() == 2, op, ": index has ", index.dim(), " dimensions, expected 2 [B, N]");
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long, op, ": index has dtype ",
                  torch::headeronly::toString(index.scalar_type()), ", expected int64");
  STD_TORCH_CHECK(index.device() == qkv.device(), op, ": index is on another device than qkv");
  const AttentionShape s{qkv.size(0), index.size(1), qkv.size(3), qkv.size(4), frames, slots.value_or(0), first};
  STD_TORCH_CHECK(index.size(0) == s.batch, op, ": index has batch ", index.size(0), ", expected ", s.batch);
  STD_TORCH_CHECK(qkv.size(1) == s.rows(), op, ": qkv has ", qkv.size(1), " rows, expected ", s.rows());
  STD_TORCH_CHECK(s.width >= 1, op, ": qkv has heads of width 0");
  STD_TORCH_CHECK(frames >= 1, op, ": frames is ", frames, ", expected at least 1");
  STD_TORCH_CHECK(!slots || (*slots >= 1 && s.tokens % *slots == 0), op, ": slots must divide the ", s.tokens,
                  " rows of index, but is ", *slots);
  return s;
}

inline void check_attention_grad(const char* op, const Tensor& grad, const Tensor& qkv, const AttentionShape& s) {
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == s.batch && grad.size(1) == s.rows() &&
                      grad.size(2) == s.heads && grad.size(3) == s.width,
                  op, ": grad must have shape [", s.batch, ", ", s.rows(), ", ", s.heads, ", ", s.width, "]");
  STD_TORCH_CHECK(grad.scalar_type() == qkv.scalar_type(), op, ": grad has dtype ",
                  torch::headeronly::toString(grad.scalar_type()), ", expected that of qkv, ",
                  torch::headeronly::toString(qkv.scalar_type()));
  STD_TORCH_CHECK(grad.device() == qkv.device(), op, ": grad is on another device than qkv");
}

}  // namespace bt
