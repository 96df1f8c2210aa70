// Rebuilds an event's nodes over slots and runs them on the inner device.
//
// All arithmetic is the inner device's own: the split's nodes are rebuilt with two substitutions.
// A weight [ne0, ne1, n_experts] becomes the arena seen as one tensor [ne0, ne1, n_slots] (stride:
// one slot), and expert ids become slot ids. MUL_MAT_ID computes each (token, rank) pair by itself,
// so any grouping of pairs gives stock's bits as long as an expert's pairs stay together and in
// token order (ggml picks kernels by the number of rows per expert).
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "chain.h"
#include "graph_memory.h"
#include "rows.h"

namespace moe {

class graphs {
  public:
    graphs(ggml_backend_t inner, rows & activations) : inner_(inner), rows_(activations), inputs_(*this) {}
    // Of one thread among several, which only reads what `inputs` has kept.
    graphs(ggml_backend_t inner, rows & activations, const graphs & inputs, int thread)
        : inner_(inner), rows_(activations), inputs_(inputs), thread_(thread) {}
    graphs(const graphs &)             = delete;
    graphs & operator=(const graphs &) = delete;

    // Some pairs of an event, and of each its slot and its expert.
    struct round {
        std::vector<int32_t> pairs, slots, experts;
        int                  copy;       // in which all of them are
        int                  only = -1;  // the one slot of all, whose number in `slots` is then 0
        int64_t              ne1, ne2;   // how many rows a tensor of them has; filled by run_round
    };

    // What a round of so many pairs takes of their memory.
    static int64_t round_bytes(const chain & c, int64_t n_pairs);

    // Nodes as they are.
    ggml_status run_plain(ggml_tensor * const * nodes, int n);
    // The whole event in its own nodes' geometry; a slot per pair.
    ggml_status run_whole(const chain & c, std::vector<int32_t> & slots);
    // Copies what rounds read from graph memory: the output of the split may lie on top of it.
    ggml_status keep_inputs(const chain & c);
    // One of those inputs, where it is now.
    const ggml_tensor & kept(const ggml_tensor * input) const;
    // Only after keep_inputs.
    ggml_status run_round(const chain & c, round & r);

  private:
    using built = std::vector<std::pair<const ggml_tensor *, ggml_tensor *>>;

    ggml_status   submit(const chain & c, ggml_cgraph * graph);
    ggml_tensor * clone(const ggml_tensor * t, int64_t ne1, int64_t ne2);
    ggml_tensor * over_slots(const chain & c, const ggml_tensor * weight, int copy, int only);
    ggml_tensor * numbers(std::vector<int32_t> & values, int64_t ne0, int64_t ne1);
    ggml_status   keep_before(const chain & c);
    ggml_tensor * rows_of(const chain & c, const ggml_tensor * input, const round & r);

    ggml_backend_t                                           inner_;
    rows &                                                   rows_;
    const graphs &                                           inputs_;
    const int                                                thread_ = -1;
    graph_memory                                             meta_{4};  // per node: itself, a weight's view and up to two gathered sources
    std::vector<std::pair<const ggml_tensor *, ggml_tensor>> kept_;     // of the chain's inputs
    built                                                    built_;    // in this round
};

}  // namespace moe
