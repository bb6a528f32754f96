// Shapes, strides and checks of gather_merge, shared by all devices.
//
// backbone [B, T, 1+P, D], branch [B, 1+N, D], gate [D] or none, index [B, N] with entries p*T + t or -1,
// frame_counts [B] or none. With m the backbone's value (row 0: mean of CLS over the first frame_counts[b] frames):
//   out = (1 - gate) * branch + gate * m,   without a gate out = branch + m,   rows of index -1 are zeros.
#pragma once

#include "common.h"

namespace bt {

struct MergeShape {
  int64_t batch, frames, patches, width, tokens;
  int64_t rows() const { return 1 + tokens; }
};

// Strides in elements; the last dimension's is 1.
struct MergeStrides {
  int64_t backbone_batch, backbone_frame, backbone_token, branch_batch, branch_row, grad_batch, grad_row;
};

inline MergeShape check_merge(const char* op, const Tensor& backbone, const Tensor& branch,
                              const std::optional<Tensor>& gate, const Tensor& index,
                              const std::optional<Tensor>& frame_counts) {
  STD_TORCH_CHECK(backbone.dim() == 4, op, ": backbone has ", backbone.dim(), " dimensions, expected 4 [B, T, 1+P, D]");
  STD_TORCH_CHECK(branch.dim() == 3, op, ": branch has ", branch.dim(), " dimensions, expected 3 [B, 1+N, D]");
  STD_TORCH_CHECK(index.dim() == 2, op, ": index has ", index.dim(), " dimensions, expected 2 [B, N]");
  const MergeShape s{backbone.size(0), backbone.size(1), backbone.size(2) - 1, backbone.size(3), index.size(1)};
  STD_TORCH_CHECK(s.frames >= 1 && s.patches >= 0, op, ": backbone needs at least one frame and a CLS token, got ",
                  s.frames, " frames of ", s.patches + 1, " tokens");
  STD_TORCH_CHECK(branch.size(0) == s.batch && branch.size(1) == s.rows() && branch.size(2) == s.width, op,
                  ": branch has shape [", branch.size(0), ", ", branch.size(1), ", ", branch.size(2), "], expected [",
                  s.batch, ", ", s.rows(), ", ", s.width, "]");
  STD_TORCH_CHECK(index.size(0) == s.batch, op, ": index has batch ", index.size(0), ", expected ", s.batch);
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long, op, ": index has dtype ",
                  torch::headeronly::toString(index.scalar_type()), ", expected int64");
  STD_TORCH_CHECK(index.device() == backbone.device(), op, ": index is on another device than backbone");
  check_same(op, "branch", branch, backbone);
  if (gate) {
    STD_TORCH_CHECK(gate->dim() == 1 && gate->size(0) == s.width, op, ": gate must have shape [", s.width, "]");
    check_same(op, "gate", *gate, backbone);
  }
  if (frame_counts) {
    STD_TORCH_CHECK(frame_counts->dim() == 1 && frame_counts->size(0) == s.batch, op,
                    ": frame_counts must have shape [", s.batch, "]");
    STD_TORCH_CHECK(frame_counts->scalar_type() == ScalarType::Long, op, ": frame_counts has dtype ",
                    torch::headeronly::toString(frame_counts->scalar_type()), ", expected int64");
    STD_TORCH_CHECK(frame_counts->device() == backbone.device(), op,
                    ": frame_counts is on another device than backbone");
  }
  return s;
}

inline void check_merge_grad(const char* op, const Tensor& grad, const Tensor& backbone, const MergeShape& s) {
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == s.batch && grad.size(1) == s.rows() && grad.size(2) == s.width,
                  op, ": grad must have shape [", s.batch, ", ", s.rows(), ", ", s.width, "]");
  check_same(op, "grad", grad, backbone);
}

inline MergeStrides merge_strides(const Tensor& backbone, const Tensor& branch, const Tensor& grad) {
  return {backbone.stride(0), backbone.stride(1), backbone.stride(2), branch.stride(0),
          branch.stride(1),   grad.stride(0),     grad.stride(1)};
}

// The tensors of a call in the layout that kernels require: adjacent elements in rows, contiguous lists.
struct MergeCall {
  MergeShape shape;
  Tensor backbone, branch, grad, index;
  std::optional<Tensor> gate, frame_counts;
  MergeStrides stride;

  // grad_in is null in the forward pass.
  MergeCall(const char* op, const Tensor& backbone_in, const Tensor& branch_in, const std::optional<Tensor>& gate_in,
            const Tensor& index_in, const std::optional<Tensor>& counts_in, const Tensor* grad_in)
      : shape(check_merge(op, backbone_in, branch_in, gate_in, index_in, counts_in)),
        backbone(adjacent_rows(backbone_in)),
        branch(adjacent_rows(branch_in)),
        grad(grad_in ? adjacent_rows(*grad_in) : branch),
        index(torch::stable::contiguous(index_in)),
        stride(merge_strides(backbone, branch, grad)) {
    if (gate_in) gate = torch::stable::contiguous(*gate_in);
    if (counts_in) frame_counts = torch::stable::contiguous(*counts_in);
    if (grad_in) check_merge_grad(op, *grad_in, backbone_in, shape);
  }
};

// Number of rows in one partial sum of the gate's gradient. It depends only on shapes, so the result does not depend on
// the number of threads. At most 512 partial sums limit the memory.
inline int64_t merge_rows_per_partial(int64_t rows) {
  const int64_t least = 64, most_partials = 512;
  const int64_t needed = (rows + most_partials - 1) / most_partials;
  return needed > least ? needed : least;
}

}  // namespace bt
