#include "arena.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "os.h"
#include "repack.h"

namespace moe {

constexpr int64_t REPACK_BYTES = 256 << 10;  // at a time, in caches

host_arena::host_arena(const weights & w, ggml_backend_buffer_type_t pinned) : weights_(w), pinned_type_(pinned) {
    for (const moe_tensor & t : w.tensors()) {
        for (int copy = 0; copy < MOE_COPIES; copy++) {
            const bool repacked = t.type[copy] >= 0 && (t.layout[copy] == MOE_LAYOUT_REPACKED || t.layout[copy] == MOE_LAYOUT_REPACK);
            traits_.push_back(repacked ? repack_traits((enum ggml_type)t.type[copy], t.ne[0], t.ne[1]) : nullptr);
            if (repacked && traits_.back() == nullptr) {
                throw std::runtime_error(std::string(t.name) + " is in a kernel layout that this machine does not have");
            }
        }
    }
}

host_arena::~host_arena() {
    if (repacked_) {
        ggml_backend_buffer_free(repacked_);
    }
    if (pinned_) {
        ggml_backend_buffer_free(pinned_);
    } else if (memory_) {
        os::release(memory_, (size_t)n_slots_ * weights_.slot_bytes);
    }
}

bool host_arena::allocate(int n_slots) {
    const size_t bytes = (size_t)n_slots * weights_.slot_bytes;
    if (!allocate_pinned(bytes)) {
        memory_ = (char *)os::allocate(bytes);
    }
    if (memory_ == nullptr) {
        return false;
    }
    n_slots_ = n_slots;
    if (std::any_of(traits_.begin(), traits_.end(), [](void * t) { return t != nullptr; })) {
        repacked_ = repack_buffer_over(memory_, bytes);
    }
    return true;
}

// Aligned as direct reads want it, which a device's allocator need not know.
bool host_arena::allocate_pinned(size_t bytes) {
    constexpr size_t ALIGN = 4096;
    if (pinned_type_ == nullptr) {
        return false;
    }
    pinned_ = ggml_backend_buft_alloc_buffer(pinned_type_, bytes + ALIGN);
    if (pinned_ && ggml_backend_buffer_get_type(pinned_) != pinned_type_) {
        ggml_backend_buffer_free(pinned_);
        pinned_ = nullptr;
    }
    if (pinned_) {
        const auto base = (uintptr_t)ggml_backend_buffer_get_base(pinned_);
        memory_         = (char *)((base + ALIGN - 1) / ALIGN * ALIGN);
    }
    return pinned_ != nullptr;
}

// Another machine's kernel layouts are made plain, and what the file has plain may be repacked.
void host_arena::finish(int slot, int key) {
    const int copy = weights_.copy_of(key);
    for (const moe_tensor * t : weights_.of_layer(weights_.layer_of(key))) {
        auto * const matrix = (uint8_t *)place(slot, t->slot_offset[copy]);
        if (t->layout[copy] == MOE_LAYOUT_FOREIGN) {
            unpack_in_place(*t, copy, matrix);
        } else if (t->layout[copy] == MOE_LAYOUT_REPACK) {
            repack_in_place(*t, copy, matrix);
        }
    }
}

void host_arena::unpack_in_place(const moe_tensor & t, int copy, uint8_t * matrix) const {
    thread_local std::vector<uint8_t> scratch;

    const auto type = (enum ggml_type)t.type[copy];
    scratch.resize(ggml_row_size(type, t.ne[0]) * t.ne[1]);
    unpack(weights_.transform(t.transform[copy]), t.ne[0] / ggml_blck_size(type), t.ne[1], matrix, scratch.data());
}

// A few rows at a time: each lane has memory for so many.
void host_arena::repack_in_place(const moe_tensor & t, int copy, uint8_t * matrix) {
    thread_local std::vector<uint8_t> plain;

    const auto    type      = (enum ggml_type)t.type[copy];
    const int64_t row_bytes = (int64_t)ggml_row_size(type, t.ne[0]);
    const int64_t at_once   = std::max<int64_t>(1, REPACK_BYTES / row_bytes / MAX_INTERLEAVE) * MAX_INTERLEAVE;
    for (int64_t row = 0, n = at_once; row < t.ne[1]; row += n) {
        n                  = std::min(n, t.ne[1] - row);
        uint8_t * const to = matrix + row * row_bytes;
        plain.assign(to, to + n * row_bytes);
        repack(type, t.ne[0], t.ne[1], n, plain.data(), to);
    }
}

void host_arena::show(const moe_tensor & weight, int copy, ggml_tensor * t) const {
    void * const traits = traits_[MOE_COPIES * weights_.index_of(weight) + copy];
    t->type             = (enum ggml_type)weight.type[copy];
    t->ne[0]            = weight.ne[0];
    t->ne[1]            = weight.ne[1];
    t->ne[2]            = n_slots_;
    t->ne[3]            = 1;
    t->nb[0]            = ggml_type_size(t->type);
    t->nb[1]            = ggml_row_size(t->type, t->ne[0]);
    t->nb[2]            = weights_.slot_bytes;
    t->nb[3]            = weights_.slot_bytes * n_slots_;
    t->data             = memory_ + weight.slot_offset[copy];
    t->buffer           = traits ? repacked_ : nullptr;
    t->extra            = traits;
}

}  // namespace moe
