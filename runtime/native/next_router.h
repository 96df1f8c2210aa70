// The next layer's router, applied on the device to what this layer's own has read: a matrix product behind
// the trunk's launch, whose few results come to the host with the ids. There it would take the processor longer
// than the layer takes the device, since routers are more than its caches keep.
#pragma once

#include <unordered_map>
#include <vector>

#include "ggml-iface.h"
#include "pinned.h"

struct moe_model;

namespace moe {

class next_router {
  public:
    // Of larger batches nobody guesses.
    static constexpr int MAX_TOKENS = 32;

    next_router(ggml_backend_t stream, moe_model & model) : stream_(stream), model_(model), fetched_(stream) {}
    ~next_router();
    next_router(const next_router &)             = delete;
    next_router & operator=(const next_router &) = delete;

    // Remembers the routers that a graph computes with; they are the llama model's and last as long as it.
    void find(const ggml_cgraph * graph);
    // Puts the product behind a view that ends before `first`, the first expert matmul of an event; false: it would be
    // of no use. The view is good until the next call.
    bool append(ggml_cgraph & view, const ggml_tensor * first);
    // Starts bringing the results of what was appended to the host.
    void fetch();
    // [n_tokens][n_experts] once the stream was waited for, without bias, until the next fetch(); nullptr: none came.
    const float * logits() const { return has_fetched_ ? fetched_.data<float>() : nullptr; }

  private:
    ggml_backend_t                         stream_;
    moe_model &                            model_;
    std::unordered_map<int, ggml_tensor *> routers_;  // by layer
    std::vector<ggml_tensor *>             nodes_;    // of the view
    ggml_tensor                            x_{}, product_{};
    ggml_backend_buffer_t                  results_ = nullptr;  // of the device
    pinned                                 fetched_;
    bool                                   is_launched_ = false, has_fetched_ = false;
};

}  // namespace moe
