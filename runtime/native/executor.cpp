#include "executor.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace moe {

// ---- building inner graphs

executor::~executor() { ggml_free(meta_); }

ggml_cgraph * executor::begin(size_t n_nodes) {
    const size_t n = n_nodes + 8;
    if (meta_ == nullptr || n > meta_nodes_) {
        ggml_free(meta_);
        meta_nodes_ = std::max<size_t>(n, 64);
        // per node: itself, a weight view and up to two gathered sources
        const ggml_init_params params = {4 * meta_nodes_ * ggml_tensor_overhead() + ggml_graph_overhead_custom(meta_nodes_, false), nullptr,
                                         true};
        meta_                         = ggml_init(params);
        if (meta_ == nullptr) {
            meta_nodes_ = 0;
            throw std::bad_alloc();
        }
    } else {
        ggml_reset(meta_);
    }
    return ggml_new_graph_custom(meta_, n, false);
}

// A node like t over [ne0, ne1, ne2] contiguous rows at data; sources are still t's.
ggml_tensor * executor::clone(const ggml_tensor * t, int64_t ne1, int64_t ne2, void * data) {
    ggml_tensor * r = ggml_new_tensor_3d(meta_, t->type, t->ne[0], ne1, ne2);
    r->op           = t->op;
    r->flags        = t->flags | GGML_TENSOR_FLAG_COMPUTE;
    r->data         = data;
    memcpy(r->op_params, t->op_params, sizeof(r->op_params));
    memcpy(r->src, t->src, sizeof(r->src));
    return r;
}

ggml_tensor * executor::slot_view(const ggml_tensor * weight, int copy) {
    const moe_model & model = *c_.model;
    const auto        where = model.in_slots(*model.find(weight), copy);
    ggml_tensor *     r     = ggml_new_tensor_3d(meta_, where.type, weight->ne[0], weight->ne[1], model.n_slots);
    r->nb[2]                = model.slot_bytes;
    r->nb[3]                = model.slot_bytes * model.n_slots;
    r->data                 = where.data;
    r->buffer               = where.buffer;
    r->extra                = where.extra;
    return r;
}

ggml_status executor::submit(ggml_cgraph * graph) {
    const int64_t     t0     = now_ns();
    const ggml_status status = ggml_backend_graph_compute(inner_, graph);
    if (c_.model) {
        c_.model->stats.compute_ns += now_ns() - t0;
        record(MOE_EVENT_COMPUTE, t0);
    }
    return status;
}

void executor::record(int kind, int64_t start_ns) {
    timeline & history = c_.model->reads->history;
    if (history.on()) {
        history.add(kind, -1, c_.layer, start_ns);
    }
}

ggml_status executor::run_plain(ggml_tensor * const * nodes, int n) {
    if (n == 0) {
        return GGML_STATUS_SUCCESS;
    }
    ggml_cgraph * graph = begin(n);
    for (int i = 0; i < n; i++) {
        ggml_graph_add_node(graph, nodes[i]);
    }
    return ggml_backend_graph_compute(inner_, graph);
}

// ---- one event

ggml_status executor::compute(ggml_cgraph * graph) {
    ggml_tensor ** nodes = ggml_graph_nodes(graph);
    const int      n     = ggml_graph_n_nodes(graph);
    if (c_.recognise(nodes, n)) {
        return run_chain();
    }
    // Node by node: slower (an event per matmul), correct for anything.
    ggml_status status = GGML_STATUS_SUCCESS;
    int         plain  = 0;
    for (int i = 0; i <= n && status == GGML_STATUS_SUCCESS; i++) {
        const bool ours = i < n && nodes[i]->op == GGML_OP_MUL_MAT_ID && is_expert_weight(nodes[i]->src[0]);
        if (!ours && i < n) {
            continue;
        }
        c_.model = nullptr;
        status   = run_plain(nodes + plain, i - plain);
        plain    = i + 1;
        if (ours && status == GGML_STATUS_SUCCESS) {
            if (!c_.recognise(nodes + i, 1)) {
                return GGML_STATUS_FAILED;
            }
            c_.model->stats.generic++;
            status = run_chain();
        }
    }
    return status;
}

// Copies the ids (graph memory is reused) and sorts the pairs by expert.
bool executor::group_pairs() {
    chain &    c     = c_;
    moe_call & call  = c.model->call;
    const int  total = c.n_used * c.n_tokens;
    ids_.resize(total);
    pairs_.resize(total);
    index_of_.resize(c.model->n_experts, -1);
    first_of_.resize(c.model->n_experts);
    for (int t = 0; t < c.n_tokens; t++) {
        for (int k = 0; k < c.n_used; k++) {
            ids_[t * c.n_used + k] = *(const int32_t *)((const char *)c.ids->data + t * c.ids->nb[1] + k * c.ids->nb[0]);
        }
    }
    int n = 0;
    for (int p = 0; p < total; p++) {
        const int e = ids_[p];
        if (e < 0 || e >= c.model->n_experts) {  // NaN in the weights can make the router's sort do this
            c.model->fail(ERROR_OTHER, "the router of layer " + std::to_string(c.layer) + " chose expert " + std::to_string(e) + " of " +
                                           std::to_string(c.model->n_experts) + ": the weights are damaged");
            return false;
        }
        if (index_of_[e] < 0) {
            index_of_[e]    = n;
            call.experts[n] = e;
            call.counts[n]  = 0;
            n++;
        }
        call.counts[index_of_[e]]++;
    }
    call.n_experts = n;
    for (int i = 0, at = 0; i < n; i++) {
        first_of_[i] = at;
        at += call.counts[i];
    }
    for (int p = 0; p < total; p++) {
        pairs_[first_of_[index_of_[ids_[p]]]++] = p;
    }
    for (int i = 0; i < n; i++) {
        first_of_[i] -= call.counts[i];
    }
    return true;
}

bool executor::ask() {
    chain &     c     = c_;
    moe_model & model = *c.model;
    moe_call &  call  = model.call;
    const auto  seen  = [&](const ggml_tensor * t) {
        const moe_tensor * where = model.find(t->src[0]);
        return std::find(model.last_seen.begin(), model.last_seen.end(), where) != model.last_seen.end();
    };
    const bool later  = c.layer > model.last_layer;
    call.continuation = model.last_layer == c.layer;
    for (const ggml_tensor * t : c.nodes) {
        if (t->op == GGML_OP_MUL_MAT_ID && seen(t)) {
            call.continuation = 0;
        }
    }
    if (!call.continuation) {
        model.last_seen.clear();
        model.last_layer = c.layer;
    }
    for (const ggml_tensor * t : c.nodes) {
        if (t->op == GGML_OP_MUL_MAT_ID) {
            model.last_seen.push_back(model.find(t->src[0]));
        }
    }
    call.layer         = c.layer;
    call.n_tokens      = c.n_tokens;
    call.n_used        = c.n_used;
    call.n_embd        = (int)c.x->ne[0];
    call.x             = (const float *)c.x->data;
    call.x_stride      = (int64_t)c.x->nb[2];
    call.ids           = ids_.data();
    call.n_guesses     = 0;
    call.wants_guesses = 0;
    if (model.route == nullptr || model.arena == nullptr) {
        model.fail(ERROR_OTHER, "the model has no controller or no arena");
        return false;
    }
    model.stats.events++;
    if (call.settled && call.phase == MOE_PHASE_DECODE && (later || call.continuation)) {
        return plan_settled();
    }
    call.settled = 0;
    drop_wrong_guesses();
    const int64_t t0 = now_ns();
    call.now_ns      = t0;
    call.disk_ns     = model.reads->disk_ns();
    call.read_bytes  = model.reads->count.bytes;
    const int32_t rc = model.route();
    model.stats.route_ns += now_ns() - t0;
    record(MOE_EVENT_ROUTE, t0);
    if (!call.continuation) {
        call.stall_ns = call.guess_ns = call.n_late = 0;  // until here those of the event before
    }
    return rc == 1 && read_plan();
}

// The plan when every expert has its slot for good. It is checked like any other.
bool executor::plan_settled() {
    moe_model & model = *c_.model;
    moe_call &  call  = model.call;
    for (int i = 0; i < call.n_experts; i++) {
        call.plan_experts[i] = call.experts[i];
        call.plan_slots[i]   = model.slot_of(model.key_of(0, c_.layer, call.experts[i]));
        call.plan_loads[i]   = 0;
    }
    if (!read_plan()) {
        return false;
    }
    if (!call.continuation) {  // what the controller would have counted
        call.settled_hits[c_.layer] += call.n_experts;
        call.settled_pairs += (int64_t)c_.n_tokens * c_.n_used;
    }
    return true;
}

// Guesses for this layer that it did not ask for, and those of layers already passed.
void executor::drop_wrong_guesses() {
    moe_model & model = *c_.model;
    const auto  wrong = [&](int key) {
        const int layer = key / model.n_experts % model.n_layers;
        return layer < c_.layer || (layer == c_.layer && index_of_[key % model.n_experts] < 0);
    };
    dropped_.clear();
    model.reads->drop_guesses(wrong, dropped_, MOE_MAX_GUESSES);
    std::copy(dropped_.begin(), dropped_.end(), model.call.cancelled);
    model.call.n_cancelled = (int32_t)dropped_.size();
}

// Turns the callback's answer into entries_. A wrong plan would compute with wrong weights, so
// everything it claims is checked against the slots.
bool executor::read_plan() {
    moe_model &      model = *c_.model;
    const moe_call & call  = model.call;
    entries_.clear();
    occupant_.resize(model.n_slots, -1);
    const char * wrong = nullptr;
    for (int i = 0; i < call.n_experts && !wrong; i++) {
        const int expert = call.plan_experts[i], slot = call.plan_slots[i];
        if (expert < 0 || expert >= model.n_experts || index_of_[expert] < 0) {
            wrong = "names an expert that was not asked for, or one twice";
        } else if (slot < 0 || slot >= model.n_slots) {
            wrong = "names a slot that does not exist";
        } else {
            bool load = call.plan_loads[i] != 0;
            int  copy = call.plan_loads[i] - 1;
            if (!load) {
                const int key = model.reads->key_of(slot);
                copy          = key == model.key_of(0, c_.layer, expert) ? 0 : key == model.key_of(1, c_.layer, expert) ? 1 : -1;
                if (copy < 0 || occupant_[slot] >= 0) {
                    wrong = "takes an expert for resident that is not";
                    break;
                }
                model.call.n_late += model.reads->promote(slot);
                load = !model.reads->coming(slot);  // a guess that failed or was given up
            } else if (copy < 0 || copy >= MOE_COPIES || !model.is_key(model.key_of(copy, c_.layer, expert))) {
                wrong = "loads a copy that does not exist";
                break;
            }
            const int index   = index_of_[expert];
            index_of_[expert] = -1;  // so that naming it again is caught
            entries_.push_back({expert, copy, slot, first_of_[index], call.counts[index], occupant_[slot], load, false, false});
            model.stats.recycled += occupant_[slot] >= 0;
            occupant_[slot] = i;
        }
    }
    for (const entry & e : entries_) {
        occupant_[e.slot] = -1;
    }
    if (wrong) {
        model.fail(ERROR_OTHER, std::string("the controller's plan ") + wrong);
    }
    return wrong == nullptr;
}

// Asks for guesses, now that the disk has what this layer waits for, and submits them.
bool executor::read_guesses() {
    moe_model & model = *c_.model;
    moe_call &  call  = model.call;
    if (model.gates && !call.wants_guesses && !call.continuation) {
        model.gates->forget();
    }
    if (call.wants_guesses && model.guess) {
        const int64_t t0  = now_ns();
        const bool    any = model.gates == nullptr || model.predict();
        const int32_t rc  = any ? model.guess() : 1;
        call.guess_ns     = now_ns() - t0;
        model.stats.guess_ns += call.guess_ns;
        record(MOE_EVENT_PREDICT, t0);
        if (rc != 1) {
            return false;
        }
    }
    for (int i = 0; i < call.n_guesses; i++) {
        const int  key = call.guess_keys[i], slot = call.guess_slots[i];
        const auto uses = [slot](const entry & e) { return e.slot == slot; };
        if (!model.is_key(key) || slot < 0 || slot >= model.n_slots || std::any_of(entries_.begin(), entries_.end(), uses)) {
            model.fail(ERROR_OTHER, "the controller guesses an expert that does not exist or into a slot that is in use");
            return false;
        }
        model.load(slot, key, true);
    }
    return true;
}

ggml_status executor::run_chain() {
    moe_model & model = *c_.model;
    if (c_.n_tokens == 0) {  // a ubatch none of whose rows is an output
        return GGML_STATUS_SUCCESS;
    }
    std::lock_guard<std::mutex> lock(model.step);
    const int64_t               t0 = model.reads->history.start();
    entries_.clear();
    const bool  planned = group_pairs() && ask();
    ggml_status status  = planned ? run_entries() : GGML_STATUS_FAILED;
    std::fill(index_of_.begin(), index_of_.end(), -1);
    record(MOE_EVENT_LAYER, t0);
    if (status != GGML_STATUS_SUCCESS) {
        waiting_.clear();
        for (const entry & e : entries_) {
            waiting_.push_back(e.slot);
        }
        model.reads->abandon(waiting_);
        model.last_layer   = -1;
        model.call.settled = 0;
    }
    model.stats.scratch_bytes = std::max<int64_t>(model.stats.scratch_bytes, scratch_.capacity() + kept_.capacity());
    return status;
}

void executor::submit_ready_loads() {
    moe_model & model = *c_.model;
    for (entry & e : entries_) {
        if (e.load && !e.submitted && (e.waits_for < 0 || entries_[e.waits_for].done)) {
            model.load(e.slot, model.key_of(e.copy, c_.layer, e.expert), false);
            e.submitted = true;
        }
    }
}

ggml_status executor::run_entries() {
    moe_model &   model = *c_.model;
    const int64_t pairs = (int64_t)c_.n_used * c_.n_tokens;
    submit_ready_loads();
    bool whole = pairs * model.n_slots * 8 <= WORK_BYTES;
    for (const entry & e : entries_) {
        whole = whole && model.reads->state(e.slot) == slot_state::READY && e.waits_for < 0 && e.copy == 0;
    }
    // Few tokens compute faster than they are guessed for, so that is left to the first moment in
    // which there is nothing to compute. Until then the disk is busy with this layer's reads.
    bool guessed = whole || c_.n_tokens > GUESS_FIRST_TOKENS;
    if (whole) {
        model.stats.whole++;
        return read_guesses() ? run_whole() : GGML_STATUS_FAILED;
    }
    if ((guessed && !read_guesses()) || keep_inputs() != GGML_STATUS_SUCCESS) {
        return GGML_STATUS_FAILED;
    }
    const auto kept     = std::find_if(copies_.begin(), copies_.end(), [this](const auto & p) { return p.first == c_.x; });
    model.call.x        = (const float *)kept->second.data;  // what it was: rounds may write over the original
    model.call.x_stride = (int64_t)kept->second.nb[2];
    const int64_t limit = std::max<int64_t>(64, std::min<int64_t>(WORK_BYTES / 8 / model.n_slots, WORK_BYTES / c_.row_bytes));
    for (size_t done = 0; done < entries_.size();) {
        ready_.clear();
        waiting_.clear();
        int64_t taken = 0;
        int     copy  = 0;
        for (size_t i = 0; i < entries_.size(); i++) {
            const entry & e = entries_[i];
            if (e.done || (e.load && !e.submitted)) {
                continue;
            }
            const slot_state state = model.reads->state(e.slot);
            if (state == slot_state::FAILED) {
                model.fail(ERROR_READ, model.reads->last_error());
                return GGML_STATUS_FAILED;
            }
            if (state == slot_state::LOADING) {
                waiting_.push_back(e.slot);
            } else if (taken == 0 || (taken + e.count <= limit && e.copy == copy)) {
                ready_.push_back((int)i);
                taken += e.count;
                copy = e.copy;
            }
        }
        if (ready_.empty() && !guessed) {
            guessed = true;
            if (!read_guesses()) {
                return GGML_STATUS_FAILED;
            }
            continue;
        }
        if (ready_.empty()) {
            const int64_t t0 = now_ns();
            model.reads->wait_any(waiting_);
            const int64_t stall_ns = now_ns() - t0;
            model.call.stall_ns += stall_ns;
            model.stats.stall_ns += stall_ns;
            record(MOE_EVENT_STALL, t0);
            continue;
        }
        const ggml_status status = run_round(ready_, copy);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
        for (int i : ready_) {
            entries_[i].done = true;
        }
        done += ready_.size();
        submit_ready_loads();
    }
    return guessed || read_guesses() ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

ggml_status executor::run_whole() {
    const int     n_experts = c_.model->n_experts;
    ggml_cgraph * graph     = begin(c_.all.size());
    round_slots_.resize(n_experts);
    for (const entry & e : entries_) {
        round_slots_[e.expert] = e.slot;
    }
    ggml_tensor * ids = ggml_new_tensor_2d(meta_, GGML_TYPE_I32, c_.n_used, c_.n_tokens);
    for (int32_t & id : ids_) {
        id = round_slots_[id];
    }
    ids->data = ids_.data();
    for (ggml_tensor * t : c_.all) {
        if (t->op != GGML_OP_MUL_MAT_ID) {
            ggml_graph_add_node(graph, t);
            continue;
        }
        ggml_tensor * r = clone(t, t->ne[1], t->ne[2], t->data);
        memcpy(r->nb, t->nb, sizeof(r->nb));
        r->src[0] = slot_view(t->src[0], 0);
        r->src[2] = ids;
        ggml_graph_add_node(graph, r);
    }
    return submit(graph);
}

// Copies what rounds read from graph memory: the output of the split may lie on top of it.
ggml_status executor::keep_inputs() {
    copies_.clear();
    size_t bytes = 0;
    for (const ggml_tensor * t : c_.inputs) {
        bytes += buffer::padded(ggml_nelements(t) * sizeof(float));
    }
    for (const ggml_tensor * t : c_.before) {
        bytes += buffer::padded(ggml_nelements(t) * sizeof(float));
    }
    kept_.reserve(bytes);
    if (!c_.before.empty()) {
        ggml_cgraph *              graph = begin(c_.before.size());
        std::vector<ggml_tensor *> results;
        for (const ggml_tensor * t : c_.before) {
            ggml_tensor * r = clone(t, t->ne[1], t->ne[2], kept_.take(ggml_nelements(t) * sizeof(float)));
            for (size_t k = 0; k < results.size(); k++) {
                for (auto & s : r->src) {
                    s = s == c_.before[k] ? results[k] : s;
                }
            }
            results.push_back(r);
            ggml_graph_add_node(graph, r);
        }
        const ggml_status status = submit(graph);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
        for (size_t k = 0; k < results.size(); k++) {
            copies_.emplace_back(c_.before[k], *results[k]);
        }
    }
    for (const ggml_tensor * t : c_.inputs) {
        if (std::find_if(copies_.begin(), copies_.end(), [t](const auto & p) { return p.first == t; }) != copies_.end()) {
            continue;
        }
        ggml_tensor  copy = *t;
        const size_t row  = t->ne[0] * sizeof(float);
        char *       to   = kept_.take(ggml_nelements(t) * sizeof(float));
        copy.data         = to;
        copy.nb[1]        = row;
        copy.nb[2]        = row * t->ne[1];
        copy.nb[3]        = copy.nb[2] * t->ne[2];
        for (int64_t i2 = 0; i2 < t->ne[2]; i2++) {
            for (int64_t i1 = 0; i1 < t->ne[1]; i1++, to += row) {
                memcpy(to, (const char *)t->data + i1 * t->nb[1] + i2 * t->nb[2], row);
            }
        }
        copies_.emplace_back(t, copy);
    }
    return GGML_STATUS_SUCCESS;
}

// The rows of an input that belong to the given pairs, as [ne0, ne1, ne2].
ggml_tensor * executor::rows_of(const ggml_tensor * input, const std::vector<int32_t> & pairs, int64_t ne1, int64_t ne2) {
    const auto          it    = std::find_if(copies_.begin(), copies_.end(), [input](const auto & p) { return p.first == input; });
    const ggml_tensor & from  = it->second;
    const size_t        row   = from.ne[0] * sizeof(float);
    const bool          fixed = from.ne[1] == 1 && from.ne[2] == 1;
    ggml_tensor *       r     = ggml_new_tensor_3d(meta_, GGML_TYPE_F32, from.ne[0], fixed ? 1 : ne1, fixed ? 1 : ne2);
    if (fixed) {
        r->data = from.data;  // one row for all pairs: ggml broadcasts it
        return r;
    }
    char * to = scratch_.take(row * pairs.size());
    r->data   = to;
    for (const int32_t p : pairs) {
        const int64_t token = p / c_.n_used, rank = from.ne[1] == 1 ? 0 : p % c_.n_used;
        memcpy(to, (const char *)from.data + rank * from.nb[1] + token * from.nb[2], row);
        to += row;
    }
    return r;
}

ggml_status executor::run_round(const std::vector<int> & chosen, int copy) {
    round_pairs_.clear();
    round_slots_.clear();
    round_experts_.clear();
    for (int i : chosen) {
        const entry & e = entries_[i];
        round_pairs_.insert(round_pairs_.end(), pairs_.begin() + e.first, pairs_.begin() + e.first + e.count);
        round_slots_.insert(round_slots_.end(), e.count, e.slot);
        round_experts_.insert(round_experts_.end(), e.count, e.expert);
    }
    const int64_t n = (int64_t)round_pairs_.size();
    // Geometry, not phase: one token keeps its shape, so that its one row is broadcast (and quantized once); several
    // tokens become one pair per row.
    const int64_t ne1 = c_.n_tokens == 1 ? n : 1, ne2 = c_.n_tokens == 1 ? 1 : n;
    scratch_.reserve(n * c_.row_bytes + 64 * (c_.nodes.size() + c_.inputs.size()));
    ggml_cgraph * graph   = begin(c_.nodes.size() + c_.inputs.size());
    ggml_tensor * slots   = ggml_new_tensor_2d(meta_, GGML_TYPE_I32, ne1, ne2);
    ggml_tensor * experts = ggml_new_tensor_2d(meta_, GGML_TYPE_I32, ne1, ne2);
    slots->data           = round_slots_.data();
    experts->data         = round_experts_.data();

    std::vector<std::pair<const ggml_tensor *, ggml_tensor *>> built;
    built.reserve(c_.nodes.size() + c_.inputs.size());
    const auto find = [&](const ggml_tensor * t) -> ggml_tensor * {
        for (const auto & b : built) {
            if (b.first == t) {
                return b.second;
            }
        }
        ggml_tensor * r = rows_of(t, round_pairs_, ne1, ne2);
        built.emplace_back(t, r);
        return r;
    };
    ggml_tensor * last = nullptr;
    for (ggml_tensor * t : c_.nodes) {
        const bool view = is_view(t->op);
        last            = clone(t, ne1, ne2, view ? nullptr : scratch_.take(t->ne[0] * sizeof(float) * n));
        if (view) {
            const ggml_tensor * whole = find(t->src[0]);
            last->data                = (char *)whole->data + ((char *)t->data - (char *)t->src[0]->data);
            last->nb[1]               = whole->nb[1];
            last->nb[2]               = whole->nb[2];
            last->nb[3]               = whole->nb[3];
            last->op                  = GGML_OP_NONE;
            memset(last->src, 0, sizeof(last->src));
        } else {
            for (int j = 0; j < GGML_MAX_SRC && t->src[j]; j++) {
                if (t->op == GGML_OP_MUL_MAT_ID) {
                    last->src[j] = j == 0 ? slot_view(t->src[0], copy) : j == 1 ? find(t->src[1]) : slots;
                } else if (t->op == GGML_OP_ADD_ID && j > 0) {
                    last->src[j] = j == 2 ? experts : t->src[j];
                } else {
                    last->src[j] = find(t->src[j]);
                }
            }
            ggml_graph_add_node(graph, last);
        }
        built.emplace_back(t, last);
    }
    const ggml_status status = submit(graph);
    if (status != GGML_STATUS_SUCCESS) {
        return status;
    }
    const ggml_tensor * out  = c_.nodes.back();
    const size_t        row  = out->ne[0] * sizeof(float);
    const char *        from = (const char *)last->data;
    for (const int32_t p : round_pairs_) {
        memcpy((char *)out->data + (p % c_.n_used) * out->nb[1] + (p / c_.n_used) * out->nb[2], from, row);
        from += row;
    }
    c_.model->stats.rounds++;
    return GGML_STATUS_SUCCESS;
}

}  // namespace moe
