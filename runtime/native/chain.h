// Recognises the expert operations of one layer: the nodes between the first expert matmul and the
// down projection. Reads tensors' metadata only; computes nothing.
#pragma once

#include <vector>

#include "ggml-iface.h"

struct moe_model;

namespace moe {

// True for a tensor whose data lives in one of our virtual buffers.
bool is_expert_weight(const ggml_tensor * t);
// 0: not in an expert chain; 1: between the first expert matmul and the down projection;
// 2: the down projection or after it. A pure function of the node and its sources.
int chain_stage(const ggml_tensor * t, int depth = 12);
// Elementwise ops the executor can run on any subset of (token, rank) pairs.
bool is_rowwise(enum ggml_op op);
bool is_view(enum ggml_op op);

// What a split looks like once recognised.
struct chain {
    moe_model *                      model  = nullptr;
    int                              layer  = -1;
    int                              n_used = 0, n_tokens = 0;
    const ggml_tensor *              ids = nullptr;
    const ggml_tensor *              x   = nullptr;
    std::vector<ggml_tensor *>       all;            // every node that computes, in graph order
    std::vector<ggml_tensor *>       nodes;          // the matmuls and what follows from them; the last is the output
    std::vector<ggml_tensor *>       before;         // nodes independent of any matmul (per-expert scales)
    std::vector<const ggml_tensor *> inputs;         // activations computed outside `nodes`
    int64_t                          row_bytes = 0;  // scratch bytes per pair in a round

    // Reads the nodes of one split; false when they are anything but one chain of one layer. What
    // was read before is forgotten.
    bool recognise(ggml_tensor * const * split, int n);
    bool contains(const ggml_tensor * t) const;

  private:
    bool take(ggml_tensor * t);
    bool take_matmul(const ggml_tensor * t);
    bool take_inputs(const ggml_tensor * t, bool matmul);
    bool only_output_remains() const;
};

}  // namespace moe
