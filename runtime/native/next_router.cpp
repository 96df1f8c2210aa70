#include "next_router.h"

#include <cstdio>

#include "model.h"

namespace moe {

next_router::~next_router() {
    if (results_) {
        ggml_backend_buffer_free(results_);
    }
}

void next_router::find(const ggml_cgraph * graph) {
    for (int i = 0; i < graph->n_nodes; i++) {
        const ggml_tensor * node  = graph->nodes[i];
        int                 layer = 0, end = 0;
        if (node->op == GGML_OP_MUL_MAT && sscanf(node->src[0]->name, "blk.%d.ffn_gate_inp.weight%n", &layer, &end) == 1 && end > 0 &&
            node->src[0]->name[end] == '\0') {
            routers_[layer] = node->src[0];
        }
    }
}

bool next_router::append(ggml_cgraph & view, const ggml_tensor * first) {
    const moe_gates *   gates = model_.dialogue.gates;
    const ggml_tensor * x     = first->src[1];
    is_launched_              = false;  // by a graph that failed before its ids were asked for
    const int  layer          = gates ? gates->next(model_.weights.find(first->src[0])->layer) : -1;
    const auto found          = routers_.find(layer);
    if (found == routers_.end() || !model_.pools->has(layer) || model_.pools->is_whole(layer)) {
        return false;
    }
    const ggml_tensor * router   = found->second;
    const int64_t       n_tokens = x->ne[2];
    if (x->type != GGML_TYPE_F32 || x->ne[1] != 1 || x->ne[3] != 1 || n_tokens < 1 || n_tokens > MAX_TOKENS || router->ne[0] != x->ne[0] ||
        router->ne[1] != model_.weights.n_experts) {
        return false;
    }
    if (results_ == nullptr) {
        ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(ggml_backend_get_device(stream_));
        results_                        = ggml_backend_buft_alloc_buffer(type, model_.weights.n_experts * MAX_TOKENS * sizeof(float));
        if (results_ == nullptr) {
            return false;
        }
        ggml_backend_buffer_set_usage(results_, GGML_BACKEND_BUFFER_USAGE_COMPUTE);
    }
    x_       = *x;
    x_.ne[1] = n_tokens;
    x_.ne[2] = 1;
    x_.nb[1] = x->nb[2];
    x_.nb[2] = x_.nb[3] = n_tokens * x->nb[2];
    product_            = {};
    product_.type       = GGML_TYPE_F32;
    product_.op         = GGML_OP_MUL_MAT;
    product_.flags      = GGML_TENSOR_FLAG_COMPUTE;
    product_.src[0]     = found->second;
    product_.src[1]     = &x_;
    product_.buffer     = results_;
    product_.data       = ggml_backend_buffer_get_base(results_);
    product_.ne[0]      = router->ne[1];
    product_.ne[1]      = n_tokens;
    product_.ne[2] = product_.ne[3] = 1;
    product_.nb[0]                  = sizeof(float);
    product_.nb[1]                  = product_.ne[0] * sizeof(float);
    product_.nb[2] = product_.nb[3] = n_tokens * product_.nb[1];
    snprintf(product_.name, sizeof(product_.name), "next_router-%d", layer);
    nodes_.assign(view.nodes, view.nodes + view.n_nodes);
    nodes_.push_back(&product_);
    view.nodes = nodes_.data();
    view.n_nodes++;
    is_launched_ = true;
    return true;
}

void next_router::fetch() {
    has_fetched_ = is_launched_;
    if (is_launched_) {
        fetched_.resize(ggml_nbytes(&product_));
        ggml_backend_tensor_get_async(stream_, &product_, fetched_.data(), 0, ggml_nbytes(&product_));
        is_launched_ = false;
        model_.stats.routed++;
    }
}

}  // namespace moe
