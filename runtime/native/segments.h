// A graph of a device, cut in front of every layer that has to be asked because its pool may lack experts. Computes
// nothing; remembers the cuts of the few graphs that a context computes again and again.
#pragma once

#include <array>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "ggml-iface.h"

struct moe_model;
struct moe_tensor;

namespace moe {

// Whether a node is one of our experts' matmuls.
bool is_ours(const ggml_tensor * node);

struct segment {
    int                     begin, end;
    bool                    asks;   // it is of one such layer
    bool                    leads;  // it ends in front of one
    std::array<uint64_t, 8> uids;   // what a device remembers its launches by, each kind on its own; 0: by nothing
};

class segments {
  public:
    explicit segments(const moe_model & model) : model_(model) {}
    // Of that graph, in order; `is_new`: it was not known.
    const std::vector<segment> & of(ggml_cgraph * graph, bool & is_new);

  private:
    const moe_tensor *   asked(const ggml_tensor * node) const;
    int                  end_of(const ggml_cgraph * graph, int first, const moe_tensor & weight) const;
    std::vector<segment> cut(const ggml_cgraph * graph) const;

    const moe_model &                                  model_;
    std::unordered_map<uint64_t, std::vector<segment>> known_;     // by the graph's uid
    std::vector<segment>                               uncached_;  // of one without
};

}  // namespace moe
