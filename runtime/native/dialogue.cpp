#include "dialogue.h"

#include <algorithm>
#include <string>

#include "model.h"

namespace moe {

dialogue::dialogue(moe_model & model) : model_(model), passing_(model, call) {
    const int n = model.weights.n_experts;
    arrays_.resize(9 * (size_t)n + 4 * MOE_MAX_GUESSES);
    chances_.resize(2 * (size_t)n);
    settled_hits_.resize(model.weights.n_layers);
    int32_t * p            = arrays_.data();
    call.experts           = p;
    call.counts            = p + n;
    call.plan_experts      = p + 2 * n;
    call.plan_slots        = p + 3 * n;
    call.plan_loads        = p + 4 * n;
    call.guess_keys        = p + 5 * n;
    call.guess_slots       = p + 5 * n + MOE_MAX_GUESSES;
    call.cancelled         = p + 5 * n + 2 * MOE_MAX_GUESSES;
    call.predicted_keys    = p + 5 * n + 3 * MOE_MAX_GUESSES;
    call.plan_pools        = p + 7 * n + 3 * MOE_MAX_GUESSES;
    call.guess_pools       = p + 8 * n + 3 * MOE_MAX_GUESSES;
    call.window_keys       = p + 8 * n + 4 * MOE_MAX_GUESSES;
    call.predicted_chances = chances_.data();
    call.settled_hits      = settled_hits_.data();
    step(MOE_PHASE_PREFILL, 1);
}

void dialogue::step(int phase, int n_sequences) {
    call.phase       = phase;
    call.n_sequences = n_sequences;
    call.settled     = 0;
}

bool dialogue::begin(const chain & c) {
    c_ = &c;
    entries.clear();
    if (!tell() || !group_pairs()) {
        return false;
    }
    remember_tensors();
    return ask();
}

void dialogue::end(bool failed) {
    std::fill(index_of_.begin(), index_of_.end(), -1);
    if (failed) {
        abandoned_.clear();
        for (const entry & e : entries) {
            if (e.slot >= 0) {
                abandoned_.push_back(e.slot);
            }
        }
        model_.reads->abandon(abandoned_);
        last_layer_  = -1;
        call.settled = call.passed = 0;
        waiting_.clear();
        passing_.forget();
    } else {
        for (entry & e : entries) {
            e.done = true;
        }
        submit_guesses();
    }
    c_ = nullptr;
}

void dialogue::input_moved(const ggml_tensor & x) {
    call.x        = (const float *)x.data;
    call.x_stride = (int64_t)x.nb[2];
}

// Sorts the pairs by expert.
bool dialogue::group_pairs() {
    const int n_experts = model_.weights.n_experts, total = c_->n_used * c_->n_tokens;
    pairs.resize(total);
    index_of_.resize(n_experts, -1);
    first_of_.resize(n_experts);
    int n = 0;
    for (const int e : ids) {
        if (e < 0 || e >= n_experts) {  // NaN in the weights can make the router's sort do this
            model_.failure.set(ERROR_OTHER, "the router of layer " + std::to_string(c_->layer) + " chose expert " + std::to_string(e) +
                                                " of " + std::to_string(n_experts) + ": the weights are damaged");
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
        pairs[first_of_[index_of_[ids[p]]]++] = p;
    }
    for (int i = 0; i < n; i++) {
        first_of_[i] -= call.counts[i];
    }
    return true;
}

// An event of the layer before it, with none of the tensors seen there, continues it.
void dialogue::remember_tensors() {
    const auto each = [this](auto && what) {
        for (const ggml_tensor * t : c_->nodes) {
            if (t->op == GGML_OP_MUL_MAT_ID) {
                what(model_.weights.find(t->src[0]));
            }
        }
    };
    is_later_         = c_->layer > last_layer_;
    call.continuation = last_layer_ == c_->layer;
    each([this](const moe_tensor * t) {
        if (std::find(last_seen_.begin(), last_seen_.end(), t) != last_seen_.end()) {
            call.continuation = 0;
        }
    });
    if (!call.continuation) {
        last_seen_.clear();
        last_layer_ = c_->layer;
    }
    each([this](const moe_tensor * t) { last_seen_.push_back(t); });
}

bool dialogue::ask() {
    call.layer         = c_->layer;
    call.n_tokens      = c_->n_tokens;
    call.n_used        = c_->n_used;
    call.n_embd        = (int)c_->x->ne[0];
    call.ids           = ids.data();
    call.n_guesses     = 0;
    call.wants_guesses = 0;
    call.n_window      = 0;
    input_moved(*c_->x);
    if (route == nullptr || model_.arena->n_slots() == 0) {
        model_.failure.set(ERROR_OTHER, "the model has no controller or no arena");
        return false;
    }
    model_.stats.events++;
    if (call.settled && call.phase == MOE_PHASE_DECODE && (is_later_ || call.continuation)) {
        return plan_settled();
    }
    call.settled     = 0;
    const int64_t t0 = now_ns();
    call.now_ns      = t0;
    call.since_ns    = ahead_ns_ ? t0 - ahead_ns_ : 0;
    ahead_ns_        = 0;
    if (call.may_pass && call.phase == MOE_PHASE_DECODE && plan_passing()) {
        model_.stats.passed++;
        return read_plan();
    }
    passing_.begin(c_->layer);
    drop_wrong_guesses();
    call.disk_ns     = model_.reads->disk_ns();
    call.read_bytes  = model_.reads->count.bytes;
    const int32_t rc = route();
    model_.stats.route_ns += now_ns() - t0;
    model_.record(MOE_EVENT_ROUTE, c_->layer, t0);
    if (!call.continuation) {
        call.stall_ns = call.guess_ns = call.n_late = 0;  // until here those of the event before
    }
    return rc == 1 && read_plan();
}

// The plan when every expert has its slot for good. It is checked like any other.
bool dialogue::plan_settled() {
    for (int i = 0; i < call.n_experts; i++) {
        call.plan_experts[i] = call.experts[i];
        call.plan_slots[i]   = model_.slot_of(model_.weights.key_of(0, c_->layer, call.experts[i]));
        call.plan_loads[i]   = 0;
    }
    if (!read_plan()) {
        return false;
    }
    if (!call.continuation) {  // what the controller would have counted
        call.settled_hits[c_->layer] += call.n_experts;
        call.settled_pairs += (int64_t)c_->n_tokens * c_->n_used;
    }
    return true;
}

bool dialogue::plan_passing() {
    return on_device() && !call.continuation && call.n_experts <= model_.pools->n_slots(c_->layer) &&
           passing_.plan([this](int expert) { return index_of_[expert] >= 0; });
}

void dialogue::look_ahead() {
    ahead_ns_ = now_ns();
    if (gates == nullptr) {
        return;
    }
    if (!call.passed || !call.may_copy || call.x == nullptr) {  // not if it was told of already
        gates->forget();
        return;
    }
    const int64_t t0 = ahead_ns_;
    predict();
    passing_.copy_ahead();
    call.guess_ns = now_ns() - t0;
    model_.stats.guess_ns += call.guess_ns;
    model_.record(MOE_EVENT_PREDICT, call.layer, t0);
}

bool dialogue::tell() {
    if (!call.passed) {
        return true;
    }
    call.passed      = 0;
    const int64_t t0 = now_ns();
    const int32_t rc = told ? told() : 0;
    model_.stats.tell_ns += now_ns() - t0;
    model_.record(MOE_EVENT_ROUTE, call.layer, t0);
    if (rc != 1) {
        passing_.forget();
    }
    return rc == 1;
}

// Guesses for this layer that it did not ask for, and those of layers already passed.
void dialogue::drop_wrong_guesses() {
    const auto wrong = [this](int key) {
        const int layer = model_.weights.layer_of(key);
        return layer < c_->layer || (layer == c_->layer && index_of_[model_.weights.expert_of(key)] < 0);
    };
    dropped_.clear();
    model_.reads->drop_guesses(wrong, dropped_, MOE_MAX_GUESSES);
    std::copy(dropped_.begin(), dropped_.end(), call.cancelled);
    call.n_cancelled = (int32_t)dropped_.size();
}

// Turns the callback's answer into entries.
bool dialogue::read_plan() {
    occupant_.resize(model_.arena->n_slots(), -1);
    n_events_++;
    const char * wrong = nullptr;
    for (int i = 0; i < call.n_experts && !wrong; i++) {
        wrong = read_entry(i);
    }
    for (const entry & e : entries) {
        if (e.slot >= 0) {
            occupant_[e.slot] = -1;
        }
    }
    if (wrong) {
        model_.failure.set(ERROR_OTHER, std::string("the controller's plan ") + wrong);
    }
    return wrong == nullptr;
}

// What is wrong with the plan's i-th claim; nullptr: nothing, and it is an entry now.
const char * dialogue::read_entry(int i) {
    const weights & w      = model_.weights;
    const int       expert = call.plan_experts[i], slot = call.plan_slots[i];
    if (expert < 0 || expert >= w.n_experts || index_of_[expert] < 0) {
        return "names an expert that was not asked for, or one twice";
    }
    const int index   = index_of_[expert];
    index_of_[expert] = -1;  // so that naming it again is caught
    if (on_device()) {
        const char * wrong = read_pool(i, index);
        if (wrong || slot < 0) {
            return wrong;
        }
    }
    return read_slot(i, index);
}

bool dialogue::on_device() const { return model_.pools && model_.pools->has(c_->layer); }

// The claim about the device's slot; where the expert is there, an entry of its own.
const char * dialogue::read_pool(int i, int index) {
    pools &    p      = *model_.pools;
    const int  expert = call.plan_experts[i];
    const bool on_cpu = call.plan_pools[i] <= MOE_ON_CPU;
    const int  slot   = on_cpu ? MOE_ON_CPU - 1 - call.plan_pools[i] : call.plan_pools[i];
    if (on_cpu && (!call.may_compute || call.plan_slots[i] < 0)) {
        return "has the processor compute what it cannot";
    }
    if (on_cpu && slot < 0) {
        return nullptr;
    }
    if (slot == -1 && p.has_window() && call.n_experts > p.n_slots(c_->layer) && call.plan_slots[i] >= 0) {
        return nullptr;
    }
    if (slot < 0 || slot >= p.n_slots(c_->layer)) {
        return "names a slot of a pool that does not exist";
    }
    pooled_.resize(std::max<size_t>(pooled_.size(), p.n_slots(c_->layer)), 0);
    if (pooled_[slot] == n_events_) {
        return "puts two experts into one slot of a pool";
    }
    pooled_[slot] = n_events_;
    if (call.plan_slots[i] >= 0) {
        p.forget(c_->layer, slot);  // until it is on its way
        return nullptr;
    }
    if (p.key_of(c_->layer, slot) != model_.weights.key_of(0, c_->layer, expert)) {
        return "takes an expert for resident on the device that is not";
    }
    entries.push_back({expert, 0, -1, first_of_[index], call.counts[index], -1, slot, false, false, false, false, false, false});
    return nullptr;
}

// The claim about the slot in memory.
const char * dialogue::read_slot(int i, int index) {
    const weights & w      = model_.weights;
    const int       expert = call.plan_experts[i], slot = call.plan_slots[i];
    if (slot < 0 || slot >= model_.arena->n_slots()) {
        return "names a slot that does not exist";
    }
    bool load = call.plan_loads[i] != 0;
    int  copy = call.plan_loads[i] - 1;
    if (!load) {
        const int key = model_.reads->key_of(slot);
        copy          = key == w.key_of(0, c_->layer, expert) ? 0 : key == w.key_of(1, c_->layer, expert) ? 1 : -1;
        if (copy < 0 || occupant_[slot] >= 0) {
            return "takes an expert for resident that is not";
        }
        call.n_late += model_.reads->promote(slot);
        load = !model_.reads->coming(slot);  // a guess that failed or was given up
    } else if (copy < 0 || copy >= MOE_COPIES || !w.is_key(w.key_of(copy, c_->layer, expert))) {
        return "loads a copy that does not exist";
    }
    if (on_device() && copy != 0) {
        return "loads a copy that the device has no slots for";
    }
    const int  said   = on_device() ? call.plan_pools[i] : -1;
    const bool on_cpu = said <= MOE_ON_CPU;
    const int  pool   = on_cpu ? MOE_ON_CPU - 1 - said : said;
    entries.push_back(
        {expert, copy, slot, first_of_[index], call.counts[index], occupant_[slot], pool, on_cpu, load, false, false, false, false});
    if (occupant_[slot] >= 0) {
        entries[occupant_[slot]].awaited = true;
        model_.stats.recycled++;
    }
    occupant_[slot] = (int32_t)entries.size() - 1;
    return nullptr;
}

// Fills call.predicted_*: whether any of it is not loaded, or not on the device that computes it.
bool dialogue::predict() {
    gates->observe(call.layer, call.ids, call.n_tokens, call.n_used);
    gates->predict(call.layer, call.x, call.x_stride, call.n_tokens, next_logits);
    const size_t n   = std::min(gates->predicted.size(), chances_.size());
    bool         any = false;
    for (size_t i = 0; i < n; i++) {
        const auto & guess        = gates->predicted[i];
        const int    key          = model_.weights.key_of(0, guess.layer, guess.expert);
        call.predicted_keys[i]    = key;
        call.predicted_chances[i] = guess.chance;
        any                       = any || !model_.is_loaded(key) || is_below(key);
    }
    call.n_predicted = (int32_t)n;
    return any;
}

bool dialogue::is_below(int key) const {
    const int layer = model_.weights.layer_of(key);
    return model_.pools && model_.pools->has(layer) && !model_.pools->is_whole(layer) && model_.pools->slot_of(key) < 0;
}

bool dialogue::ask_for_guesses() {
    ahead_ns_ = now_ns();
    if (gates && !call.wants_guesses && !call.continuation && !call.passed) {
        gates->forget();
    }
    if (call.wants_guesses && guess) {
        const int64_t t0  = ahead_ns_;
        const bool    any = gates == nullptr || predict();
        const int32_t rc  = any ? guess() : 1;
        call.guess_ns     = now_ns() - t0;
        model_.stats.guess_ns += call.guess_ns;
        model_.record(MOE_EVENT_PREDICT, c_->layer, t0);
        if (rc != 1) {
            return false;
        }
    }
    bool copies = false;
    for (int i = 0; i < call.n_guesses; i++) {
        const int key = call.guess_keys[i], slot = call.guess_slots[i];
        if (call.guess_pools[i] >= 0) {
            if (!copy_ahead(key, slot, call.guess_pools[i])) {
                return false;
            }
            copies = true;
            continue;
        }
        if (!model_.weights.is_key(key) || slot < 0 || slot >= model_.arena->n_slots()) {
            model_.failure.set(ERROR_OTHER, "the controller guesses an expert or into a slot that does not exist");
            return false;
        }
        int last = -1;
        for (size_t j = 0; j < entries.size(); j++) {
            last = entries[j].slot == slot ? (int)j : last;
        }
        if (last >= 0) {
            entries[last].awaited = true;
        }
        waiting_.push_back({key, slot, last});
    }
    if (copies) {
        model_.pools->issue();
    }
    submit_guesses();
    return true;
}

// Starts copying an expert that is in memory to the device, for a layer that does not compute now.
bool dialogue::copy_ahead(int key, int slot, int pool) {
    const bool exists = model_.pools && model_.weights.is_key(key) && model_.weights.copy_of(key) == 0;
    const int  layer  = exists ? model_.weights.layer_of(key) : -1;
    if (!exists || layer == c_->layer || pool >= model_.pools->n_slots(layer) || model_.pools->is_whole(layer) || slot < 0 ||
        slot >= model_.arena->n_slots() || model_.reads->key_of(slot) != key || model_.reads->state(slot) != slot_state::READY) {
        model_.failure.set(ERROR_OTHER, "the controller guesses an expert for the device that is not in memory, or has no slot there");
        return false;
    }
    model_.upload(slot, layer, pool);
    model_.stats.uploads_ahead++;
    passing_.guessed(layer, pool);
    return true;
}

void dialogue::submit_guesses() {
    const auto submitted = [this](const waiting & w) {
        if (w.entry >= 0 && !entries[w.entry].done) {
            return false;
        }
        model_.load(w.slot, w.key, true);
        return true;
    };
    waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(), submitted), waiting_.end());
}

}  // namespace moe
