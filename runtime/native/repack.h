// ggml-cpu's repacked weight layouts: kernels of this machine that want a matrix in another order
// of bytes. Finds the buffer type behind them, converts to the layout and, given a description of
// it, back. Does not know experts or slots.
#pragma once

#include "ggml-iface.h"
#include "moe.h"

namespace moe {

// No repacked layout interleaves more rows: whole multiples of them are repacked like all.
constexpr int64_t MAX_INTERLEAVE = 16;

// ggml-cpu's CPU_REPACK buffer type; nullptr in a build without it.
ggml_backend_buffer_type_t repack_type();

// What ggml-cpu attaches to a tensor of that type and shape to compute on it; nullptr: it has no
// repacked layout for it.
void * repack_traits(enum ggml_type type, int64_t ne0, int64_t ne1);

// Makes memory that holds repacked bytes known to ggml-cpu as such; owns nothing.
ggml_backend_buffer_t repack_buffer_over(void * memory, size_t n_bytes);

// Repacks rows [0, ne1) of a plain matrix into `out`; traits are those of the whole tensor.
void repack(enum ggml_type type, int64_t ne0, int64_t ne1, int64_t n_rows, const void * plain, void * out);

// Undoes an interleaving in place; scratch has room for the matrix.
void unpack(const moe_transform & how, int64_t n_blocks, int64_t n_rows, uint8_t * matrix, uint8_t * scratch);

}  // namespace moe
