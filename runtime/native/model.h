// One open model as the plugin sees it: where expert bytes lie, the arena, the stream for
// llama.cpp, the route callback and the counters. Decides nothing.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "gates.h"
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
    // Starts reading an expert into a slot.
    void load(int slot, int key, bool guess);
    // The slot a key was last read into, or -1.
    int slot_of(int key) const { return slot_of_[key]; }
    // Whether a slot holds or awaits it; a failed or cancelled read may go unnoticed.
    bool is_loaded(int key) const { return slot_of_[key] >= 0 && reads->key_of(slot_of_[key]) == key; }
    // Fills call.predicted_*: whether any of it is not loaded.
    bool predict();
    // Reads experts into slots and waits for all of them; false after fail().
    bool fill(const int32_t * keys, const int32_t * slots, int n);
    int  key_of(int copy, int layer, int expert) const { return (copy * n_layers + layer) * n_experts + expert; }
    bool is_key(int key) const { return key >= 0 && key < (int)first_part_.size() - 1 && first_part_[key] < first_part_[key + 1]; }
    // A weight's matrices of one copy over all slots, for ggml: base address, type and, where the
    // layout is repacked, what ggml-cpu wants to see in the tensor.
    struct slot_tensor {
        char *                data;
        enum ggml_type        type;
        ggml_backend_buffer_t buffer;
        void *                extra;
    };
    slot_tensor in_slots(const moe_tensor & tensor, int copy) const;
    // Fills a trunk tensor from its file; false when the tensor is not of this model.
    bool read_trunk(ggml_tensor * tensor);
    // Where that tensor lies now; nullptr if it is unknown, not loaded or repacked.
    const void * trunk_data(const char * name) const;
    void         fail(moe::error_kind kind, const std::string & sentence);

    int                         n_experts;
    int                         n_layers;  // the highest MoE layer plus one
    int64_t                     slot_bytes;
    int                         n_slots = 0;
    char *                      arena   = nullptr;
    ggml_backend_buffer_type    expert_buft{};
    ggml_backend_buffer_type    trunk_buft{};
    ggml_backend_buffer_type    repack_buft{};
    std::unique_ptr<moe::reads> reads;
    moe_route_fn                route = nullptr;
    moe_route_fn                guess = nullptr;
    moe_gates *                 gates = nullptr;
    moe_call                    call{};
    moe_stats                   stats{};
    int64_t                     disk_ns_at_reset = 0;
    std::mutex                  step;  // one context at a time computes on the slots
    // Which tensors of which layer the running step has seen, to tell a continuation.
    int                             last_layer = -1;
    std::vector<const moe_tensor *> last_seen;
    std::mutex                      error_mutex;
    moe::error_kind                 error_kind = moe::ERROR_NONE;
    std::string                     error;

  private:
    struct transform {
        moe_transform        how;
        std::vector<int32_t> source;
        std::vector<uint8_t> flip;
    };

    void make_plain(int slot, int key);

    std::vector<std::string>                     paths_;
    std::vector<moe_trunk_tensor>                trunk_;
    std::unordered_map<std::string, int>         trunk_by_name_;
    std::vector<const void *>                    trunk_data_;
    std::vector<moe_tensor>                      tensors_;
    std::unordered_map<std::string, int>         by_name_;
    std::vector<std::vector<const moe_tensor *>> by_layer_;
    std::vector<moe_part>                        table_;
    std::vector<int32_t>                         first_part_;  // key -> index in table_; one more at the end
    std::vector<transform>                       transforms_;
    std::vector<void *>                          traits_;              // [tensor][copy]
    ggml_backend_buffer_t                        repacked_ = nullptr;  // the arena, as ggml-cpu has to see it
    std::vector<uint8_t>                         header_;
    int64_t                                      stream_bytes_;
    std::vector<moe::part>                       parts_;
    std::vector<int32_t>                         arrays_;
    std::vector<float>                           chances_;
    std::vector<int64_t>                         settled_hits_;
    std::vector<int>                             slot_of_;
};
