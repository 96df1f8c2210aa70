// The tables of one model's routed experts: which tensors there are, where each key's bytes lie on disk
// and in a slot, and how keys are counted. Constant once made; knows no memory.
#pragma once

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ggml.h"
#include "moe.h"

namespace moe {

class weights {
  public:
    explicit weights(const moe_config & config);
    weights(const weights &)             = delete;  // what it hands out points into it
    weights & operator=(const weights &) = delete;

    int     n_experts;
    int     n_layers;  // the highest MoE layer plus one
    int64_t slot_bytes;

    const std::vector<moe_tensor> & tensors() const { return tensors_; }
    const moe_tensor *              find(const ggml_tensor * weight) const;
    int                             index_of(const moe_tensor & tensor) const { return (int)(&tensor - tensors_.data()); }
    // Those of one layer; none where a layer has no experts.
    const std::vector<const moe_tensor *> & of_layer(int layer) const { return by_layer_[layer]; }

    int  n_keys() const { return (int)first_part_.size() - 1; }
    int  key_of(int copy, int layer, int expert) const { return (copy * n_layers + layer) * n_experts + expert; }
    bool is_key(int key) const { return key >= 0 && key < n_keys() && first_part_[key] < first_part_[key + 1]; }
    int  copy_of(int key) const { return key / (n_layers * n_experts); }
    int  layer_of(int key) const { return key / n_experts % n_layers; }
    int  expert_of(int key) const { return key % n_experts; }
    // Where a key's bytes are: begin and end.
    std::pair<const moe_part *, const moe_part *> parts(int key) const {
        return {parts_.data() + first_part_[key], parts_.data() + first_part_[key + 1]};
    }

    // Whether slots hold matrices as files have them.
    bool                  are_as_stored() const;
    const moe_transform & transform(int index) const { return transforms_[index].how; }

  private:
    struct kept_transform {
        moe_transform        how;
        std::vector<int32_t> source;
        std::vector<uint8_t> flip;
    };

    std::vector<moe_tensor>                      tensors_;
    std::unordered_map<std::string, int>         by_name_;
    std::vector<std::vector<const moe_tensor *>> by_layer_;
    std::vector<moe_part>                        parts_;
    std::vector<int32_t>                         first_part_;  // key -> index in parts_; one more at the end
    std::vector<kept_transform>                  transforms_;
};

}  // namespace moe
