// One open model as the plugin sees it: where expert bytes lie, the arena, the stream for
// llama.cpp, the route callback and the counters. Decides nothing.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "ggml-iface.h"
#include "moe.h"
#include "reads.h"

namespace moe {

enum error_kind { ERROR_NONE = 0, ERROR_READ = 1, ERROR_OTHER = 2 };

}  // namespace moe

struct moe_model {
    explicit moe_model(const moe_config & config);
    ~moe_model();

    FILE *             open_stream();
    bool               allocate_arena(int n_slots);
    const moe_tensor * find(const ggml_tensor * weight) const;
    // The destination and source of every part of one expert in one slot.
    const std::vector<moe::part> & parts_of(int layer, int expert, int slot);
    bool has_layer(int layer) const { return layer >= 0 && layer < (int)by_layer_.size() && !by_layer_[layer].empty(); }
    // Fills a trunk tensor from its file; false when the tensor is not of this model.
    bool read_trunk(const ggml_tensor * tensor);
    void fail(moe::error_kind kind, const std::string & sentence);

    int                         n_experts;
    int64_t                     slot_bytes;
    int                         n_slots = 0;
    char *                      arena   = nullptr;
    ggml_backend_buffer_type    expert_buft{};
    ggml_backend_buffer_type    trunk_buft{};
    std::unique_ptr<moe::reads> reads;
    moe_route_fn                route = nullptr;
    moe_call                    call{};
    moe_stats                   stats{};
    std::mutex                  step;  // one context at a time computes on the slots
    // Which tensors of which layer the running step has seen, to tell a continuation.
    int                             last_layer = -1;
    std::vector<const moe_tensor *> last_seen;
    std::mutex                      error_mutex;
    moe::error_kind                 error_kind = moe::ERROR_NONE;
    std::string                     error;

  private:
    std::vector<std::string>                     paths_;
    std::vector<moe_trunk_tensor>                trunk_;
    std::unordered_map<std::string, int>         trunk_by_name_;
    std::vector<moe_tensor>                      tensors_;
    std::unordered_map<std::string, int>         by_name_;
    std::vector<std::vector<const moe_tensor *>> by_layer_;
    std::vector<uint8_t>                         header_;
    int64_t                                      stream_bytes_;
    std::vector<moe::part>                       parts_;
    std::vector<int32_t>                         arrays_;
};
