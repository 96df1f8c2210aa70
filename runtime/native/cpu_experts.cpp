#include "cpu_experts.h"

#include <algorithm>
#include <cstring>

#include "ggml-moe.h"
#include "model.h"

namespace moe {

namespace {

constexpr size_t ALIGN = 64;

size_t padded(size_t bytes) { return (bytes + ALIGN - 1) / ALIGN * ALIGN; }

const ggml_tensor * base_of(const ggml_tensor * t) { return t->view_src ? t->view_src : t; }

bool is_weight(const ggml_tensor * t) {
    const ggml_tensor * base = base_of(t);
    return base->op == GGML_OP_NONE && base->buffer && base->buffer->usage == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
}

}  // namespace

cpu_experts::~cpu_experts() {
    graphs_.reset();
    if (inner_) {
        ggml_backend_free(inner_);
    }
}

bool cpu_experts::start() {
    if (inner_ == nullptr) {
        inner_  = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
        graphs_ = inner_ ? std::make_unique<graphs>(inner_, rows_) : nullptr;
    }
    return inner_ != nullptr;
}

// ---- the chain, over host memory

ggml_tensor * cpu_experts::copy(const ggml_tensor * t) {
    tensors_.push_back(*t);
    return twins_[t] = &tensors_.back();
}

ggml_tensor * cpu_experts::twin_of(const ggml_tensor * t) const {
    const auto it = twins_.find(t);
    return it == twins_.end() ? nullptr : it->second;
}

// A bias, or the scales of experts: brought when it is first needed.
ggml_tensor * cpu_experts::constant(const ggml_tensor * t) {
    if (!is_weight(t)) {
        return nullptr;
    }
    const ggml_tensor * base  = base_of(t);
    std::vector<char> & bytes = constants_[base->data];
    if (bytes.empty()) {
        bytes.resize(ggml_nbytes(base));
        ggml_backend_tensor_get(base, bytes.data(), 0, bytes.size());
    }
    ggml_tensor * r = copy(t);
    r->op           = GGML_OP_NONE;
    r->data         = bytes.data() + ((const char *)t->data - (const char *)base->data);
    r->buffer       = nullptr;
    r->view_src     = nullptr;
    memset(r->src, 0, sizeof(r->src));
    return r;
}

bool cpu_experts::prepare(const chain & c) {
    tensors_.clear();
    twins_.clear();
    ids_        = *c.ids;
    ids_.op     = GGML_OP_NONE;
    ids_.data   = nullptr;  // until begin()
    ids_.buffer = nullptr;
    ids_.nb[1]  = c.n_used * sizeof(int32_t);
    memset(ids_.src, 0, sizeof(ids_.src));
    twins_[c.ids]  = &ids_;
    c_.model       = c.model;
    c_.layer       = c.layer;
    c_.n_used      = c.n_used;
    c_.n_tokens    = c.n_tokens;
    c_.row_bytes   = c.row_bytes;
    c_.ids         = &ids_;
    output_        = c.nodes.back();
    const bool can = start() && take_before(c) && take_inputs(c) && take_nodes(c);
    c_.x           = can ? twin_of(c.x) : nullptr;
    return can;
}

bool cpu_experts::take_before(const chain & c) {
    c_.before.clear();
    for (const ggml_tensor * t : c.before) {
        ggml_tensor * r = copy(t);
        for (auto & s : r->src) {
            if (s) {
                ggml_tensor * known = twin_of(s);
                s                   = known ? known : constant(s);
                if (s == nullptr) {
                    return false;
                }
            }
        }
        c_.before.push_back(r);
    }
    return true;
}

bool cpu_experts::take_inputs(const chain & c) {
    c_.inputs.clear();
    size_t bytes = 0;
    for (const ggml_tensor * t : c.inputs) {
        bytes += twin_of(t) ? 0 : padded(ggml_nbytes(t));
    }
    inputs_.resize(bytes);
    bytes = 0;
    for (const ggml_tensor * t : c.inputs) {
        if (twin_of(t) == nullptr) {
            if (twin_of(base_of(t))) {  // a view of what is not computed yet
                return false;
            }
            ggml_tensor * r = copy(t);
            r->data         = inputs_.data() + bytes;
            ggml_backend_tensor_get_async(stream_, t, r->data, 0, ggml_nbytes(t));
            bytes += padded(ggml_nbytes(t));
        }
        c_.inputs.push_back(twin_of(t));
    }
    return true;
}

bool cpu_experts::take_nodes(const chain & c) {
    c_.nodes.clear();
    for (const ggml_tensor * t : c.nodes) {
        ggml_tensor * r = copy(t);
        for (int j = 0; j < GGML_MAX_SRC; j++) {
            ggml_tensor * s = t->src[j];
            if (s == nullptr || (t->op == GGML_OP_MUL_MAT_ID && j == 0)) {
                continue;
            }
            ggml_tensor * known = twin_of(s);
            r->src[j]           = known ? known : constant(s);
            if (r->src[j] == nullptr) {
                return false;
            }
        }
        c_.nodes.push_back(r);
    }
    return true;
}

const char * cpu_experts::input(const ggml_tensor * t) const {
    const ggml_tensor * r = twin_of(t);
    return r ? (const char *)r->data : nullptr;
}

// ---- computing

bool cpu_experts::begin(const int32_t * ids) {
    ids_.data         = (void *)ids;
    ggml_tensor * out = c_.nodes.back();
    out->nb[1]        = out->ne[0] * sizeof(float);
    out->nb[2]        = out->nb[1] * out->ne[1];
    out->nb[3]        = out->nb[2] * out->ne[2];
    results_.resize(ggml_nbytes(out));
    out->data = results_.data();
    pairs_.clear();
    set_n_threads(inner_, n_threads());
    return graphs_->keep_inputs(c_) == GGML_STATUS_SUCCESS;
}

ggml_status cpu_experts::compute(const std::vector<dialogue::entry *> & entries) {
    const auto & pairs = c_.model->dialogue.pairs;
    round_.pairs.clear();
    round_.slots.clear();
    round_.experts.clear();
    round_.copy = 0;
    for (const dialogue::entry * e : entries) {
        round_.pairs.insert(round_.pairs.end(), pairs.begin() + e->first, pairs.begin() + e->first + e->count);
        round_.slots.insert(round_.slots.end(), e->count, e->slot);
        round_.experts.insert(round_.experts.end(), e->count, e->expert);
    }
    pairs_.insert(pairs_.end(), round_.pairs.begin(), round_.pairs.end());
    return graphs_->run_round(c_, round_);
}

// Neighbours in one copy.
void cpu_experts::send() {
    const ggml_tensor & from = *c_.nodes.back();
    const size_t        row  = from.nb[1];
    std::sort(pairs_.begin(), pairs_.end());
    for (size_t i = 0, n = 1; i < pairs_.size(); i += n) {
        const int32_t p = pairs_[i];
        for (n = 1; i + n < pairs_.size() && output_->nb[1] == row; n++) {
            const int32_t next = p + (int32_t)n;
            if (pairs_[i + n] != next || next % c_.n_used == 0) {
                break;
            }
        }
        const size_t offset = p % c_.n_used * output_->nb[1] + p / c_.n_used * output_->nb[2];
        ggml_backend_tensor_set_async(stream_, (ggml_tensor *)output_, (const char *)from.data + p * row, offset, n * row);
    }
    pairs_.clear();
}

}  // namespace moe
