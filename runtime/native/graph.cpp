#include "graph.h"

#include <algorithm>
#include <cstring>

#include "model.h"

namespace moe {

// A node like t over [ne0, ne1, ne2] contiguous rows that have no memory yet; sources are still t's.
ggml_tensor * graphs::clone(const ggml_tensor * t, int64_t ne1, int64_t ne2) {
    ggml_tensor * r = ggml_new_tensor_3d(meta_.get(), t->type, t->ne[0], ne1, ne2);
    r->op           = t->op;
    r->flags        = t->flags | GGML_TENSOR_FLAG_COMPUTE;
    memcpy(r->op_params, t->op_params, sizeof(r->op_params));
    memcpy(r->src, t->src, sizeof(r->src));
    return r;
}

ggml_tensor * graphs::over_slots(const chain & c, const ggml_tensor * weight, int copy, int only) {
    ggml_tensor * r = ggml_new_tensor_1d(meta_.get(), GGML_TYPE_F32, 1);
    c.model->arena->show(*c.model->weights.find(weight), copy, r);
    if (only >= 0) {
        r->data  = (char *)r->data + only * r->nb[2];
        r->ne[2] = 1;
    }
    return r;
}

// Ids of a graph, in the host's memory: that is where MUL_MAT_ID of ggml-cpu reads them.
ggml_tensor * graphs::numbers(std::vector<int32_t> & values, int64_t ne0, int64_t ne1) {
    ggml_tensor * r = ggml_new_tensor_2d(meta_.get(), GGML_TYPE_I32, ne0, ne1);
    r->data         = values.data();
    return r;
}

ggml_status graphs::submit(const chain & c, ggml_cgraph * graph) {
    const int64_t     t0     = now_ns();
    const ggml_status status = ggml_backend_graph_compute(inner_, graph);
    if (thread_ < 0) {
        c.model->stats.compute_ns += now_ns() - t0;
    }
    c.model->record(MOE_EVENT_COMPUTE, c.layer, t0, thread_);
    return status;
}

ggml_status graphs::run_plain(ggml_tensor * const * nodes, int n) {
    if (n == 0) {
        return GGML_STATUS_SUCCESS;
    }
    ggml_cgraph * graph = meta_.begin(n);
    for (int i = 0; i < n; i++) {
        ggml_graph_add_node(graph, nodes[i]);
    }
    return ggml_backend_graph_compute(inner_, graph);
}

ggml_status graphs::run_whole(const chain & c, std::vector<int32_t> & slots) {
    ggml_cgraph * graph = meta_.begin(c.all.size());
    ggml_tensor * ids   = numbers(slots, c.n_used, c.n_tokens);
    for (ggml_tensor * t : c.all) {
        if (t->op != GGML_OP_MUL_MAT_ID) {
            ggml_graph_add_node(graph, t);
            continue;
        }
        ggml_tensor * r = clone(t, t->ne[1], t->ne[2]);
        r->data         = t->data;
        memcpy(r->nb, t->nb, sizeof(r->nb));
        r->src[0] = over_slots(c, t->src[0], 0, -1);
        r->src[2] = ids;
        ggml_graph_add_node(graph, r);
    }
    return submit(c, graph);
}

// ---- what rounds read

const ggml_tensor & graphs::kept(const ggml_tensor * input) const {
    const auto it = std::find_if(kept_.begin(), kept_.end(), [input](const auto & p) { return p.first == input; });
    GGML_ASSERT(it != kept_.end());
    return it->second;
}

ggml_status graphs::keep_inputs(const chain & c) {
    kept_.clear();
    size_t bytes = 0;
    for (const ggml_tensor * t : c.inputs) {
        bytes += rows::padded(ggml_nelements(t) * sizeof(float));
    }
    for (const ggml_tensor * t : c.before) {
        bytes += rows::padded(ggml_nelements(t) * sizeof(float));
    }
    rows_.reserve(rows::EVENT, bytes);
    const ggml_status status = c.before.empty() ? GGML_STATUS_SUCCESS : keep_before(c);
    if (status != GGML_STATUS_SUCCESS) {
        return status;
    }
    for (const ggml_tensor * t : c.inputs) {
        if (std::find_if(kept_.begin(), kept_.end(), [t](const auto & p) { return p.first == t; }) != kept_.end()) {
            continue;
        }
        ggml_tensor copy = *t;
        copy.nb[1]       = t->ne[0] * sizeof(float);
        copy.nb[2]       = copy.nb[1] * t->ne[1];
        copy.nb[3]       = copy.nb[2] * t->ne[2];
        rows_.put(rows::EVENT, &copy);
        rows_.copy(t, &copy);
        kept_.emplace_back(t, copy);
    }
    return GGML_STATUS_SUCCESS;
}

// Computes the nodes that depend on no matmul straight into kept memory.
ggml_status graphs::keep_before(const chain & c) {
    ggml_cgraph * graph = meta_.begin(c.before.size());
    built_.clear();
    for (const ggml_tensor * t : c.before) {
        ggml_tensor * r = clone(t, t->ne[1], t->ne[2]);
        rows_.put(rows::EVENT, r);
        for (const auto & b : built_) {
            for (auto & s : r->src) {
                s = s == b.first ? b.second : s;
            }
        }
        built_.emplace_back(t, r);
        ggml_graph_add_node(graph, r);
    }
    const ggml_status status = submit(c, graph);
    for (const auto & b : built_) {
        kept_.emplace_back(b.first, *b.second);
    }
    return status;
}

// ---- one round

// The rows of an input that belong to the round's pairs.
ggml_tensor * graphs::rows_of(const chain & c, const ggml_tensor * input, const round & r) {
    const ggml_tensor & from = inputs_.kept(input);
    if (from.ne[1] == 1 && from.ne[2] == 1) {  // one row for all pairs: ggml broadcasts it
        ggml_tensor * t = ggml_new_tensor_3d(meta_.get(), GGML_TYPE_F32, from.ne[0], 1, 1);
        t->data         = from.data;
        return t;
    }
    ggml_tensor * t = ggml_new_tensor_3d(meta_.get(), GGML_TYPE_F32, from.ne[0], r.ne1, r.ne2);
    rows_.put(rows::ROUND, t);
    rows_.gather(&from, r.pairs, c.n_used, t);
    return t;
}

int64_t graphs::round_bytes(const chain & c, int64_t n_pairs) {
    return n_pairs * c.row_bytes + rows::padded(1) * (c.nodes.size() + c.inputs.size());
}

ggml_status graphs::run_round(const chain & c, round & r) {
    const int64_t n       = (int64_t)r.pairs.size();
    const size_t  n_nodes = c.nodes.size() + c.inputs.size();
    // Geometry, not phase: one token keeps its shape, so that its one row is broadcast (and quantized
    // once); several tokens become one pair per row.
    r.ne1 = c.n_tokens == 1 ? n : 1;
    r.ne2 = c.n_tokens == 1 ? 1 : n;
    rows_.reserve(rows::ROUND, round_bytes(c, n));
    ggml_cgraph * graph   = meta_.begin(n_nodes);
    ggml_tensor * slots   = numbers(r.slots, r.ne1, r.ne2);
    ggml_tensor * experts = numbers(r.experts, r.ne1, r.ne2);

    built_.clear();
    const auto find = [&](const ggml_tensor * t) -> ggml_tensor * {
        for (const auto & b : built_) {
            if (b.first == t) {
                return b.second;
            }
        }
        ggml_tensor * gathered = rows_of(c, t, r);
        built_.emplace_back(t, gathered);
        return gathered;
    };
    for (ggml_tensor * t : c.nodes) {
        ggml_tensor * last = clone(t, r.ne1, r.ne2);
        if (is_view(t->op)) {
            const ggml_tensor * whole = find(t->src[0]);
            last->data                = (char *)whole->data + ((char *)t->data - (char *)t->src[0]->data);
            std::copy(whole->nb + 1, whole->nb + GGML_MAX_DIMS, last->nb + 1);
            last->op = GGML_OP_NONE;
            memset(last->src, 0, sizeof(last->src));
        } else {
            rows_.put(rows::ROUND, last);
            for (int j = 0; j < GGML_MAX_SRC && t->src[j]; j++) {
                if (t->op == GGML_OP_MUL_MAT_ID) {
                    last->src[j] = j == 0 ? over_slots(c, t->src[0], r.copy, r.only) : j == 1 ? find(t->src[1]) : slots;
                } else if (t->op == GGML_OP_ADD_ID && j > 0) {
                    last->src[j] = j == 2 ? experts : t->src[j];
                } else {
                    last->src[j] = find(t->src[j]);
                }
            }
            ggml_graph_add_node(graph, last);
        }
        built_.emplace_back(t, last);
    }
    const ggml_status status = submit(c, graph);
    if (status == GGML_STATUS_SUCCESS) {
        rows_.scatter(built_.back().second, r.pairs, c.n_used, c.nodes.back());
        c.model->stats.rounds += thread_ < 0;
    }
    return status;
}

}  // namespace moe
