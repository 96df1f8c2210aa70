#include "telling.h"

#include <algorithm>
#include <utility>

#include "model.h"
#include "os.h"

namespace moe {

namespace {

// Waking a thread takes longer than many a layer, on a virtual machine above all: it is woken for several events, of at
// most a part of the layers, so that nobody soon waits for what it slept through.
constexpr int MOST_AT_ONCE = 8, PART = 4;

// The arrays of an event that matter afterwards, with how much of them is used.
struct array {
    int32_t * moe_call::* of;
    int32_t               n;
};

std::vector<array> arrays(const moe_call & call) {
    return {
        {&moe_call::experts, call.n_experts},          {&moe_call::counts, call.n_experts},     {&moe_call::plan_experts, call.n_experts},
        {&moe_call::plan_pools, call.n_experts},       {&moe_call::guess_keys, call.n_guesses}, {&moe_call::guess_pools, call.n_guesses},
        {&moe_call::predicted_keys, call.n_predicted},
    };
}

}  // namespace

telling::telling(moe_model & model)
    : model_(model),
      ring_(model.weights.n_layers + 1),
      last_(model.weights.n_layers),
      at_once_(std::clamp(model.weights.n_layers / PART, 1, MOST_AT_ONCE)) {
    const int n = model.weights.n_experts;
    numbers_.resize(6 * (size_t)n + 2 * MOE_MAX_GUESSES);
    chances_.resize(2 * (size_t)n);
    call.n_experts   = n;
    call.n_guesses   = MOE_MAX_GUESSES;
    call.n_predicted = 2 * n;
    int32_t * p      = numbers_.data();
    for (const array & a : arrays(call)) {
        call.*a.of = p;
        p += a.n;
    }
    call.predicted_chances = chances_.data();
}

template <class Condition>
void telling::wait_until(std::unique_lock<std::mutex> & lock, Condition met) {
    if (!met()) {
        const int64_t t0 = now_ns();
        changed_.notify_all();
        changed_.wait(lock, met);
        waited_ns_ += now_ns() - t0;
    }
}

bool telling::take() { return !std::exchange(has_failed_, false); }

bool telling::put(const moe_call & event) {
    std::unique_lock<std::mutex> lock(mutex_);
    wait_until(lock, [this] { return has_failed_ || put_ - told_ < (int64_t)ring_.size(); });
    if (!take()) {
        return false;
    }
    record & r = ring_[put_ % ring_.size()];
    r.call     = event;
    r.numbers.clear();
    for (const array & a : arrays(event)) {
        r.numbers.insert(r.numbers.end(), event.*a.of, event.*a.of + a.n);
    }
    r.chances.assign(event.predicted_chances, event.predicted_chances + event.n_predicted);
    last_[event.layer] = ++put_;
    if (put_ - told_ >= at_once_) {
        changed_.notify_all();
    }
    return true;
}

bool telling::drain() {
    std::unique_lock<std::mutex> lock(mutex_);
    wait_until(lock, [this] { return has_failed_ || told_ == put_; });
    return take();
}

bool telling::wait(int layer) {
    std::unique_lock<std::mutex> lock(mutex_);
    wait_until(lock, [&] { return has_failed_ || told_ >= last_[layer]; });
    return !has_failed_;
}

bool telling::next(bool went_well) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (is_telling_) {
        is_telling_ = false;
        told_ns_ += now_ns() - began_ns_;
        model_.record(MOE_EVENT_ROUTE, call.layer, began_ns_);
        may_copy_   = went_well && call.may_copy;
        has_failed_ = !went_well;
        told_       = went_well ? told_ + 1 : put_;
        changed_.notify_all();
    }
    changed_.wait(lock, [this] { return has_ended_ || told_ < put_; });
    if (has_ended_) {
        return false;
    }
    const record &  r = ring_[told_ % ring_.size()];
    const int32_t * p = r.numbers.data();
    for (const array & a : arrays(r.call)) {
        std::copy_n(p, a.n, call.*a.of);
        p += a.n;
    }
    std::copy(r.chances.begin(), r.chances.end(), chances_.begin());
    call.layer       = r.call.layer;
    call.n_tokens    = r.call.n_tokens;
    call.n_used      = r.call.n_used;
    call.n_experts   = r.call.n_experts;
    call.phase       = r.call.phase;
    call.n_sequences = r.call.n_sequences;
    call.now_ns      = r.call.now_ns;
    call.since_ns    = r.call.since_ns;
    call.n_guesses   = r.call.n_guesses;
    call.n_predicted = r.call.n_predicted;
    is_telling_      = true;
    began_ns_        = now_ns();
    return true;
}

void telling::end() {
    std::lock_guard<std::mutex> lock(mutex_);
    has_ended_ = true;
    changed_.notify_all();
}

}  // namespace moe
