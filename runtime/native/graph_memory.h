// The structs of one graph after the other, without the memory of its tensors.
#pragma once

#include <algorithm>
#include <new>

#include "ggml.h"

namespace moe {

class graph_memory {
  public:
    // So many tensors are made for each node, itself among them.
    explicit graph_memory(int per_node) : per_node_(per_node) {}
    ~graph_memory() { ggml_free(meta_); }
    graph_memory(const graph_memory &)             = delete;
    graph_memory & operator=(const graph_memory &) = delete;

    // An empty graph for so many nodes; what was made before is gone. Throws std::bad_alloc.
    ggml_cgraph * begin(size_t n_nodes) {
        if (n_nodes > n_nodes_) {
            ggml_free(meta_);
            n_nodes_           = std::max<size_t>(n_nodes, 64);
            const size_t bytes = per_node_ * n_nodes_ * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes_, false);
            meta_              = ggml_init({bytes, nullptr, true});
            if (meta_ == nullptr) {
                n_nodes_ = 0;
                throw std::bad_alloc();
            }
        } else {
            ggml_reset(meta_);
        }
        return ggml_new_graph_custom(meta_, n_nodes_, false);
    }
    // To make its tensors in.
    ggml_context * get() const { return meta_; }

  private:
    const int      per_node_;
    ggml_context * meta_    = nullptr;
    size_t         n_nodes_ = 0;
};

}  // namespace moe
