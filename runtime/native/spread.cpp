#include "spread.h"

#include <cstring>
#include <vector>

#include "model.h"

namespace moe {

namespace {

constexpr int TRIED_FLOATS = 4096, TRIED_ROWS = 2;

// Some kernels count in 32 bits.
constexpr int64_t MOST_FLOATS = INT32_MAX;

// What a conversion might touch: NaNs of every kind, infinities, denormals, either zero.
std::vector<uint32_t> odd_floats(int n) {
    std::vector<uint32_t> bits(n);
    for (uint32_t i = 0; i < bits.size(); i++) {
        const uint32_t sign_and_fraction = (i * 2654435761u) & (i % 5 ? 0x807fffffu : 0x80000000u);
        bits[i]                          = i % 3 == 0 ? i * 2654435761u : sign_and_fraction | (i % 3 == 1 ? 0x7f800000u : 0u);
    }
    return bits;
}

}  // namespace

spread::~spread() {
    if (buffer_) {
        ggml_backend_buffer_free(buffer_);
    }
}

ggml_tensor * spread::rows(enum ggml_type type, int64_t n, int64_t n_rows, ggml_backend_buffer_t buffer, void * data) {
    ggml_tensor * t = ggml_new_tensor_2d(meta_.get(), type, n, n_rows);
    t->buffer       = buffer;
    t->data         = data;
    return t;
}

ggml_tensor * spread::numbers(int64_t n) { return rows(GGML_TYPE_I32, n, 1, buffer_, ggml_backend_buffer_get_base(buffer_)); }

bool spread::is_able() {
    if (able_ < 0) {
        const int64_t n = model_.weights.n_experts;
        buffer_         = ggml_backend_alloc_buffer(stream_, n * sizeof(int32_t));
        able_           = buffer_ && n >= TRIED_ROWS && keeps_bits();
        if (able_) {
            experts_.resize(model_.weights.n_layers * n * sizeof(int32_t));
        }
    }
    return able_ == 1;
}

bool spread::keeps_bits() {
    constexpr size_t      ROW    = TRIED_FLOATS * sizeof(float);
    ggml_backend_buffer_t memory = ggml_backend_alloc_buffer(stream_, 2 * TRIED_ROWS * ROW);
    if (memory == nullptr) {
        return false;
    }
    char *        base  = (char *)ggml_backend_buffer_get_base(memory);
    ggml_cgraph * graph = meta_.begin(1);
    ggml_tensor * from  = rows(GGML_TYPE_F32, TRIED_FLOATS, TRIED_ROWS, memory, base);
    ggml_tensor * to    = rows(GGML_TYPE_F32, TRIED_FLOATS, TRIED_ROWS, memory, base + TRIED_ROWS * ROW);
    ggml_tensor * where = numbers(TRIED_ROWS);
    ggml_tensor * node  = ggml_set_rows(meta_.get(), to, from, where);
    node->buffer        = memory;
    node->flags |= GGML_TENSOR_FLAG_COMPUTE;
    ggml_graph_add_node(graph, node);
    const auto            bits = odd_floats(TRIED_ROWS * TRIED_FLOATS);
    std::vector<uint32_t> got(bits.size());
    const int32_t         swapped[TRIED_ROWS] = {1, 0};
    bool                  same                = ggml_backend_dev_supports_op(ggml_backend_get_device(stream_), node);
    if (same) {
        ggml_backend_tensor_set(from, bits.data(), 0, TRIED_ROWS * ROW);
        ggml_backend_tensor_set(where, swapped, 0, sizeof(swapped));
        same = ggml_backend_graph_compute_async(stream_, graph) == GGML_STATUS_SUCCESS;
        ggml_backend_synchronize(stream_);
        ggml_backend_tensor_get(to, got.data(), 0, TRIED_ROWS * ROW);
        same = same && memcmp(got.data(), bits.data() + TRIED_FLOATS, ROW) == 0 && memcmp(got.data() + TRIED_FLOATS, bits.data(), ROW) == 0;
    }
    ggml_backend_buffer_free(memory);
    return same;
}

bool spread::launch(int layer) {
    pools &      p       = *model_.pools;
    const auto & weights = model_.weights.of_layer(layer);
    const int    n       = p.n_slots(layer);
    if (!is_able()) {
        return false;
    }
    ggml_cgraph * graph = meta_.begin(weights.size() + 1);
    ggml_tensor * where = numbers(n);
    for (const moe_tensor * weight : weights) {
        const ggml_tensor &from = *p.tensor(*weight), &to = *p.window(*weight);
        const int64_t      n_floats = (int64_t)(from.nb[2] / sizeof(float));
        if (from.nb[2] % sizeof(float) != 0 || n_floats * n > MOST_FLOATS) {
            return false;
        }
        ggml_tensor * node = ggml_set_rows(meta_.get(), rows(GGML_TYPE_F32, n_floats, to.ne[2], to.buffer, to.data),
                                           rows(GGML_TYPE_F32, n_floats, n, from.buffer, from.data), where);
        node->buffer       = to.buffer;
        node->flags |= GGML_TENSOR_FLAG_COMPUTE;
        ggml_graph_add_node(graph, node);
    }
    int32_t * experts = experts_.data<int32_t>() + (ptrdiff_t)layer * model_.weights.n_experts;
    for (int slot = 0; slot < n; slot++) {
        experts[slot] = model_.weights.expert_of(p.key_of(layer, slot));
    }
    ggml_backend_tensor_set_async(stream_, where, experts, 0, n * sizeof(int32_t));
    return ggml_backend_graph_compute_async(stream_, graph) == GGML_STATUS_SUCCESS;
}

}  // namespace moe
