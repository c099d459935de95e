// What the operators on token matrices share: rows with positions, sums of rows. B clips, R rows of a clip, C columns,
// N tokens. fp32 or bf16, the last dimension contiguous; sums are fp32 in an order that does not depend on the threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace mvd {

// Raises ValueError unless every entry of index int64 is in [0, tokens).
void check_index(const char* name, const at::Tensor& index, int64_t tokens);

// out[b, r] = base[b, r] + bias + pos[b, index[b, r]]: out, base [B, R, C] (base may be expanded, and may be out),
// pos [B or 1, N, C], bias [C], index contiguous [B, R].
void write_rows(const at::Tensor& out, const at::Tensor& base, const std::optional<at::Tensor>& bias,
                const std::optional<at::Tensor>& pos, const at::Tensor& index);

// Sum of all rows [B, R, C] -> fp32 [C].
at::Tensor sum_rows(const at::Tensor& rows);

// sums[b, index[b, r]] += rows[b, r]; sums fp32 contiguous [B or 1, N, C], where 1 takes the rows of all clips.
void sum_rows_by_token(const at::Tensor& sums, const at::Tensor& rows, const at::Tensor& index);

}  // namespace mvd
