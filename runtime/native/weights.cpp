#include "weights.h"

#include <algorithm>

namespace moe {

weights::weights(const moe_config & config)
    : n_experts(config.n_experts),
      n_layers(0),
      slot_bytes(config.slot_bytes),
      tensors_(config.tensors, config.tensors + config.n_tensors),
      parts_(config.parts, config.parts + config.n_parts),
      transforms_(config.n_transforms) {
    for (const auto & t : tensors_) {
        n_layers = std::max(n_layers, t.layer + 1);
    }
    by_layer_.resize(n_layers);
    for (size_t i = 0; i < tensors_.size(); i++) {
        by_name_[tensors_[i].name] = (int)i;
        by_layer_[tensors_[i].layer].push_back(&tensors_[i]);
    }
    first_part_.resize(MOE_COPIES * (size_t)n_layers * n_experts + 1);
    for (size_t key = 0, i = 0; key < first_part_.size(); key++) {
        first_part_[key] = (int32_t)i;
        while (i < parts_.size() && parts_[i].key == (int32_t)key) {
            i++;
        }
    }
    for (size_t i = 0; i < transforms_.size(); i++) {
        kept_transform & t     = transforms_[i];
        const size_t     bytes = (size_t)config.transforms[i].rows * config.transforms[i].block_bytes;
        t.how                  = config.transforms[i];
        t.source.assign(t.how.source, t.how.source + 8 * bytes);
        t.flip.assign(t.how.flip, t.how.flip + bytes);
        t.how.source = t.source.data();
        t.how.flip   = t.flip.data();
    }
}

bool weights::are_as_stored() const {
    const auto as_stored = [](int32_t layout) { return layout == MOE_LAYOUT_PLAIN || layout == MOE_LAYOUT_REPACKED; };
    return std::all_of(tensors_.begin(), tensors_.end(),
                       [&](const moe_tensor & t) { return std::all_of(std::begin(t.layout), std::end(t.layout), as_stored); });
}

const moe_tensor * weights::find(const ggml_tensor * weight) const {
    const auto it = by_name_.find(weight->name);
    return it == by_name_.end() ? nullptr : &tensors_[it->second];
}

}  // namespace moe
