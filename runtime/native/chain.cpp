#include "chain.h"

#include <algorithm>

#include "buffer.h"
#include "model.h"

namespace moe {

bool is_rowwise(enum ggml_op op) {
    switch (op) {
        case GGML_OP_GLU:
        case GGML_OP_UNARY:
        case GGML_OP_CLAMP:
        case GGML_OP_SCALE:
        case GGML_OP_SQR:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
        case GGML_OP_ADD:
        case GGML_OP_SUB:
        case GGML_OP_ADD_ID:
            return true;
        default:
            return false;
    }
}

bool is_view(enum ggml_op op) { return op == GGML_OP_VIEW || op == GGML_OP_RESHAPE; }

int chain_stage(const ggml_tensor * t, int depth) {
    if (t == nullptr || depth == 0) {
        return 0;
    }
    if (t->op == GGML_OP_MUL_MAT_ID && is_expert_weight(t->src[0])) {
        return chain_stage(t->src[1], depth - 1) > 0 ? 2 : 1;
    }
    if (!is_rowwise(t->op) && !is_view(t->op)) {
        return 0;
    }
    int stage = 0;
    for (int i = 0; i < 2 && stage < 2; i++) {
        stage = std::max(stage, chain_stage(t->src[i], depth - 1));
    }
    return stage;
}

bool chain::contains(const ggml_tensor * t) const { return std::find(nodes.begin(), nodes.end(), t) != nodes.end(); }

bool chain::recognise(ggml_tensor * const * split, int n) {
    model = nullptr;
    ids = x   = nullptr;
    row_bytes = 0;
    all.clear();
    nodes.clear();
    before.clear();
    inputs.clear();
    // Views that end the split compute nothing: of the output, or of a weight the next split needs
    // (the down projection's scale). A view of any other result here would keep that result alive.
    const int n_all = n;
    while (n > 1 && is_view(split[n - 1]->op)) {
        n--;
    }
    for (int i = n; i < n_all; i++) {
        if (std::find(split, split + n - 1, split[i]->view_src) != split + n - 1) {
            return false;
        }
    }
    for (int i = 0; i < n; i++) {
        if (split[i]->op != GGML_OP_NONE && !take(split[i])) {
            return false;
        }
    }
    return !nodes.empty() && !is_view(nodes.back()->op) && only_output_remains();
}

bool chain::take(ggml_tensor * t) {
    const bool matmul  = t->op == GGML_OP_MUL_MAT_ID && is_expert_weight(t->src[0]);
    const bool depends = matmul || std::any_of(t->src, t->src + GGML_MAX_SRC, [this](auto * s) { return s && contains(s); });
    if (!depends) {
        if (is_view(t->op)) {
            return true;
        }
        all.push_back(t);
        before.push_back(t);
        return t->op == GGML_OP_REPEAT || t->op == GGML_OP_GET_ROWS;
    }
    if (matmul ? !take_matmul(t) : !is_rowwise(t->op) && !is_view(t->op)) {
        return false;
    }
    if (t->type != GGML_TYPE_F32 || t->ne[1] != n_used || t->ne[2] != n_tokens || t->ne[3] != 1) {
        return false;
    }
    if (is_view(t->op)) {
        // Only slices of a row (gate and up inside gate_up) keep pairs independent.
        const size_t offset = (char *)t->data - (char *)t->src[0]->data;
        if (t->nb[1] != t->src[0]->nb[1] || offset + t->ne[0] * sizeof(float) > t->nb[1]) {
            return false;
        }
    } else {
        row_bytes += buffer::padded(t->ne[0] * sizeof(float));
        all.push_back(t);
    }
    const bool known = take_inputs(t, matmul);
    nodes.push_back(t);
    return known;
}

// Of the same layer, over the same choice of experts, as the first.
bool chain::take_matmul(const ggml_tensor * t) {
    auto *             owner = (moe_model *)buffer_type::owner(t->src[0]->buffer->buft);
    const moe_tensor * where = owner->weights.find(t->src[0]);
    if (where == nullptr || t->src[2]->type != GGML_TYPE_I32) {
        return false;
    }
    if (model == nullptr) {
        model    = owner;
        layer    = where->layer;
        ids      = t->src[2];
        x        = t->src[1];
        n_used   = (int)ids->ne[0];
        n_tokens = (int)ids->ne[1];
    }
    return model == owner && layer == where->layer && ids == t->src[2];
}

// What a node reads that the chain does not compute: rows of pairs, of tokens, or one for all.
bool chain::take_inputs(const ggml_tensor * t, bool matmul) {
    for (int j = 0; j < GGML_MAX_SRC; j++) {
        const ggml_tensor * s = t->src[j];
        if (s == nullptr || contains(s) || (matmul && j != 1)) {
            continue;
        }
        if (t->op == GGML_OP_ADD_ID && j > 0) {
            if (j == 2 && s != ids) {
                return false;
            }
            continue;
        }
        const bool pairs  = s->ne[1] == n_used && s->ne[2] == n_tokens;
        const bool tokens = s->ne[1] == 1 && s->ne[2] == n_tokens;
        const bool fixed  = s->ne[1] == 1 && s->ne[2] == 1;
        if (s->ne[3] != 1 || s->type != GGML_TYPE_F32 || s->nb[0] != sizeof(float) || !(pairs || tokens || fixed)) {
            return false;
        }
        if (std::find(inputs.begin(), inputs.end(), s) == inputs.end()) {
            inputs.push_back(s);
            row_bytes += buffer::padded(s->ne[0] * sizeof(float));
        }
    }
    return true;
}

// Rounds write only the last node's memory: every other result must die inside the split.
bool chain::only_output_remains() const {
    const auto dies = [this](const ggml_tensor * t) {
        const auto reads = [t](const ggml_tensor * user) {
            return std::find(user->src, user->src + GGML_MAX_SRC, t) != user->src + GGML_MAX_SRC;
        };
        return !(t->flags & GGML_TENSOR_FLAG_OUTPUT) &&
               (std::any_of(nodes.begin(), nodes.end(), reads) || std::any_of(before.begin(), before.end(), reads));
    };
    return std::all_of(nodes.begin(), nodes.end() - 1, dies) && std::all_of(before.begin(), before.end(), dies);
}

}  // namespace moe
