#include "passing.h"

#include <algorithm>

#include "model.h"

namespace moe {

passing::passing(moe_model & model, moe_call & call)
    : model_(model),
      call_(call),
      spares_((size_t)model.weights.n_layers * MOE_MAX_SPARES, MOE_SPARE_NONE),
      chances_((size_t)model.weights.n_layers * MOE_MAX_SPARES, 2.0f),
      guessed_(model.weights.n_layers) {
    call.spares       = spares_.data();
    call.copy_chances = chances_.data();
    call.n_layers     = model.weights.n_layers;
}

int passing::take_spare(int layer, bool demanded, const std::function<bool(int)> & is_needed) {
    int32_t * spares = &spares_[(size_t)layer * MOE_MAX_SPARES];
    for (int i = 0; i < MOE_MAX_SPARES && spares[i] != MOE_SPARE_NONE; i++) {
        const int spare = spares[i];
        if (spare == MOE_SPARE_GUESSES && demanded) {
            const int slot = take_guess(layer, is_needed);
            if (slot >= 0) {
                return slot;
            }
        }
        if (spare < 0 || spare >= model_.pools->n_slots(layer)) {
            continue;
        }
        const int key = model_.pools->key_of(layer, spare);
        if (key < 0 || !is_needed(key)) {
            spares[i] = MOE_SPARE_TAKEN;
            return spare;
        }
    }
    return -1;
}

int passing::take_guess(int layer, const std::function<bool(int)> & is_needed) {
    std::vector<int> & guessed = guessed_[layer];
    const auto         key_of  = [&](int slot) { return model_.pools->key_of(layer, slot); };
    std::sort(guessed.begin(), guessed.end(), [&](int a, int b) { return key_of(a) < key_of(b); });
    const auto wrong = std::find_if(guessed.begin(), guessed.end(), [&](int slot) { return !is_needed(key_of(slot)); });
    if (wrong == guessed.end()) {
        return -1;
    }
    const int slot = *wrong;
    guessed.erase(wrong);
    return slot;
}

bool passing::plan(const std::function<bool(int)> & asks) {
    const auto key_of = [this](int i) { return model_.weights.key_of(0, call_.layer, call_.experts[i]); };
    int        n      = 0;  // of the plan
    const auto add    = [&](int i, int slot, int pool) {
        call_.plan_experts[n] = call_.experts[i];
        call_.plan_slots[n]   = slot;
        call_.plan_pools[n]   = pool;
        call_.plan_loads[n++] = 0;
    };
    missing_.clear();
    for (int i = 0; i < call_.n_experts; i++) {
        const int pool = model_.pools->slot_of(key_of(i));
        if (pool >= 0) {
            add(i, -1, pool);
        } else if (model_.slot_in_memory(key_of(i)) >= 0) {
            missing_.push_back(i);
        } else {
            return false;
        }
    }
    std::stable_sort(missing_.begin(), missing_.end(), [this](int a, int b) { return call_.counts[a] > call_.counts[b]; });
    for (const int i : missing_) {
        const int pool = take_spare(call_.layer, true, [&](int key) { return asks(model_.weights.expert_of(key)); });
        if (pool < 0) {
            return false;  // whoever is asked now names others
        }
        add(i, model_.slot_in_memory(key_of(i)), pool);
    }
    call_.passed = 1;
    begin(call_.layer);
    return true;
}

// Of the predictions for the next layer those that are to be copied.
void passing::choose(int layer) {
    const float * least = &chances_[(size_t)call_.layer * MOE_MAX_SPARES];
    chosen_.clear();
    for (int i = 0; i < call_.n_predicted && chosen_.size() < MOE_MAX_SPARES; i++) {
        const int key = call_.predicted_keys[i];
        if (model_.weights.layer_of(key) != layer) {
            break;
        }
        if (model_.pools->slot_of(key) >= 0 || model_.slot_in_memory(key) < 0) {
            continue;
        }
        if (!(call_.predicted_chances[i] > least[chosen_.size()])) {
            break;
        }
        chosen_.push_back(i);
    }
}

void passing::copy_ahead() {
    call_.n_guesses = 0;
    const int layer = call_.n_predicted ? model_.weights.layer_of(call_.predicted_keys[0]) : call_.layer;
    if (layer == call_.layer || !model_.pools->has(layer) || model_.pools->is_whole(layer)) {
        return;
    }
    choose(layer);
    call_.n_predicted     = chosen_.empty() ? 0 : chosen_.back() + 1;  // the rest came into no question
    const int32_t * begin = call_.predicted_keys;
    for (const int i : chosen_) {
        // None takes the slot of a better guess.
        const int32_t * end  = begin + chosen_.back();
        const int       pool = take_spare(layer, false, [&](int key) { return std::find(begin, end, key) != end; });
        if (pool < 0) {
            break;
        }
        const int key = call_.predicted_keys[i], slot = model_.slot_in_memory(key);
        model_.upload(slot, layer, pool);
        model_.stats.uploads_ahead++;
        call_.guess_keys[call_.n_guesses]  = key;
        call_.guess_slots[call_.n_guesses] = slot;
        call_.guess_pools[call_.n_guesses] = pool;
        call_.n_guesses++;
        guessed(layer, pool);
    }
    if (call_.n_guesses) {
        model_.pools->issue();
    }
}

}  // namespace moe
