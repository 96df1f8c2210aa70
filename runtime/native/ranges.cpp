#include "ranges.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace moe {

namespace {

constexpr size_t ALIGN = 256;
// Ids of the largest usual batches: a graph whose launch is recorded finds them where they were.
constexpr size_t IDS_BYTES = 1 << 20;

size_t padded(size_t bytes) { return (bytes + ALIGN - 1) / ALIGN * ALIGN; }
size_t row_bytes(const ggml_tensor * t) { return t->ne[0] * ggml_type_size(t->type); }

void make_contiguous(ggml_tensor * t) {
    t->nb[0] = ggml_type_size(t->type);
    t->nb[1] = row_bytes(t);
    t->nb[2] = t->nb[1] * t->ne[1];
    t->nb[3] = t->nb[2] * t->ne[2];
}

bool is_of_tokens(const chain & c, const ggml_tensor * t) { return t->ne[2] == c.n_tokens && c.n_tokens > 1; }

}  // namespace

ranges::~ranges() {
    for (const memory * m : {&ids_, &inputs_, &between_}) {
        if (m->buffer) {
            ggml_backend_buffer_free(m->buffer);
        }
    }
}

// Memory that the stream may still be at work on is not given back before it is done.
void ranges::reserve(memory & m, size_t bytes) {
    m.used = 0;
    if (m.buffer && ggml_backend_buffer_get_size(m.buffer) >= bytes) {
        return;
    }
    if (m.buffer) {
        ggml_backend_synchronize(stream_);
        ggml_backend_buffer_free(m.buffer);
    }
    m.buffer = ggml_backend_alloc_buffer(stream_, bytes);
    if (m.buffer == nullptr) {
        throw std::bad_alloc();
    }
}

void ranges::put(memory & m, ggml_tensor * t) {
    t->buffer = m.buffer;
    t->data   = (char *)ggml_backend_buffer_get_base(m.buffer) + m.used;
    m.used += padded(ggml_nbytes(t));
    GGML_ASSERT(m.used <= ggml_backend_buffer_get_size(m.buffer));
}

// ---- ids

ggml_tensor * ranges::slots(int n_used, int n_tokens) {
    ggml_tensor t{};
    t.type  = GGML_TYPE_I32;
    t.ne[0] = n_used;
    t.ne[1] = n_tokens;
    t.ne[2] = t.ne[3] = 1;
    make_contiguous(&t);
    slots_ = experts_ = t;
    reserve(ids_, std::max(IDS_BYTES, 2 * padded(ggml_nbytes(&t))));
    first_ids_ = first_ids_ ? first_ids_ : ggml_backend_buffer_get_base(ids_.buffer);
    put(ids_, &slots_);
    put(ids_, &experts_);
    return &slots_;
}

void ranges::send(const int32_t * slots, const int32_t * experts, int first, int last) {
    const size_t row = slots_.nb[1], from = first * row, bytes = (last - first) * row;
    ggml_backend_tensor_set_async(stream_, &slots_, (const char *)slots + from, from, bytes);
    if (experts) {
        ggml_backend_tensor_set_async(stream_, &experts_, (const char *)experts + from, from, bytes);
    }
}

ggml_tensor * ranges::number(ggml_tensor & of, int first, int last) {
    ggml_tensor * t = ggml_new_tensor_1d(meta_.get(), GGML_TYPE_I32, 1);
    *t              = of;
    t->ne[1]        = last - first;
    t->nb[2] = t->nb[3] = t->nb[1] * t->ne[1];
    t->data             = (char *)of.data + first * of.nb[1];
    return t;
}

// ---- what the pieces read

ggml_tensor * ranges::find(const built & in, const ggml_tensor * t) {
    const auto it = std::find_if(in.begin(), in.end(), [t](const auto & pair) { return pair.first == t; });
    return it == in.end() ? nullptr : it->second;
}

// Inputs first: in the graph's memory what is computed before a matmul may lie on top of the input of an
// earlier one.
ggml_status ranges::keep(const chain & c) {
    kept_.clear();
    kept_tensors_.clear();
    kept_tensors_.reserve(c.inputs.size() + c.before.size());
    size_t bytes = ALIGN;
    for (const ggml_tensor * t : c.inputs) {
        bytes += padded(ggml_nelements(t) * ggml_type_size(t->type));
    }
    for (const ggml_tensor * t : c.before) {
        bytes += padded(ggml_nelements(t) * ggml_type_size(t->type));
    }
    reserve(inputs_, bytes);
    const auto is_before = [&c](const ggml_tensor * t) {
        const ggml_tensor * base = t->view_src ? t->view_src : t;
        return std::find(c.before.begin(), c.before.end(), base) != c.before.end();
    };
    ggml_cgraph * graph = meta_.begin(c.before.size() + c.inputs.size());
    for (const ggml_tensor * t : c.inputs) {
        if (is_of_tokens(c, t) && !is_before(t)) {
            ggml_tensor * copy = clone(t, t->ne[2]);
            copy->op           = GGML_OP_CONT;
            copy->src[0]       = (ggml_tensor *)t;
            add(graph, t, copy);
        }
    }
    for (const ggml_tensor * t : c.before) {
        ggml_tensor * copy = clone(t, t->ne[2]);
        for (int j = 0; j < GGML_MAX_SRC; j++) {
            ggml_tensor * done = t->src[j] ? find(kept_, t->src[j]) : nullptr;
            copy->src[j]       = done ? done : t->src[j];
        }
        add(graph, t, copy);
    }
    for (const ggml_tensor * t : c.inputs) {
        if (is_before(t) && t->view_src) {  // a view of one that was just computed
            ggml_tensor * base = find(kept_, t->view_src);
            kept_tensors_.push_back(*t);
            ggml_tensor & view = kept_tensors_.back();
            view.op            = GGML_OP_NONE;
            view.buffer        = base->buffer;
            view.data          = (char *)base->data + t->view_offs;
            kept_.push_back({t, &view});
        }
    }
    return ggml_backend_graph_compute_async(stream_, graph);
}

// A node whose result is kept.
void ranges::add(ggml_cgraph * graph, const ggml_tensor * of, ggml_tensor * node) {
    put(inputs_, node);
    ggml_graph_add_node(graph, node);
    kept_tensors_.push_back(*node);
    ggml_tensor & kept = kept_tensors_.back();
    kept.op            = GGML_OP_NONE;
    memset(kept.src, 0, sizeof(kept.src));
    kept_.push_back({of, &kept});
}

// ---- a piece

ggml_tensor * ranges::clone(const ggml_tensor * t, int64_t n_tokens) {
    ggml_tensor * r = ggml_new_tensor_3d(meta_.get(), t->type, t->ne[0], t->ne[1], n_tokens);
    r->op           = t->op;
    r->flags        = t->flags | GGML_TENSOR_FLAG_COMPUTE;
    memcpy(r->op_params, t->op_params, sizeof(r->op_params));
    memcpy(r->name, t->name, sizeof(r->name));
    return r;
}

ggml_tensor * ranges::source(const chain & c, const ggml_tensor * s, int first, int last) {
    if (ggml_tensor * r = find(built_, s)) {
        return r;
    }
    if (!is_of_tokens(c, s)) {
        return (ggml_tensor *)s;
    }
    const ggml_tensor * kept = find(kept_, s);
    GGML_ASSERT(kept != nullptr);
    ggml_tensor * r = ggml_new_tensor_1d(meta_.get(), s->type, 1);
    *r              = *kept;
    r->ne[2]        = last - first;
    r->nb[3]        = r->nb[2] * r->ne[2];
    r->data         = (char *)kept->data + first * kept->nb[2];
    built_.push_back({s, r});
    return r;
}

ggml_status ranges::run(const chain & c, int first, int last, const std::function<ggml_tensor *(const ggml_tensor *)> & weight) {
    const int64_t n     = last - first;
    size_t        bytes = ALIGN;
    for (const ggml_tensor * t : c.nodes) {
        bytes += is_view(t->op) ? 0 : padded(row_bytes(t) * t->ne[1] * n);
    }
    reserve(between_, bytes);
    ggml_cgraph * graph = meta_.begin(c.nodes.size() + c.inputs.size() + 8);
    built_.clear();
    for (const ggml_tensor * t : c.nodes) {
        ggml_tensor * r = clone(t, n);
        if (t == c.nodes.back()) {
            memcpy(r->nb, t->nb, sizeof(r->nb));
            r->data   = (char *)t->data + first * t->nb[2];
            r->buffer = t->view_src ? t->view_src->buffer : t->buffer;
        } else if (is_view(t->op)) {
            const ggml_tensor * base = source(c, t->src[0], first, last);
            memcpy(r->nb, t->nb, sizeof(r->nb));
            r->data   = (char *)base->data + ((const char *)t->data - (const char *)t->src[0]->data);
            r->buffer = base->buffer;
            r->op     = GGML_OP_NONE;
            built_.push_back({t, r});
            continue;
        } else {
            put(between_, r);
        }
        for (int j = 0; j < GGML_MAX_SRC; j++) {
            const ggml_tensor * s = t->src[j];
            if (s == nullptr) {
                continue;
            }
            if (t->op == GGML_OP_MUL_MAT_ID && j != 1) {
                r->src[j] = j == 0 ? weight(s) : number(slots_, first, last);
            } else if (t->op == GGML_OP_ADD_ID && j > 0) {
                r->src[j] = j == 1 ? (ggml_tensor *)s : number(experts_, first, last);
            } else {
                r->src[j] = source(c, s, first, last);
            }
        }
        built_.push_back({t, r});
        ggml_graph_add_node(graph, r);
    }
    return ggml_backend_graph_compute_async(stream_, graph);
}

}  // namespace moe
