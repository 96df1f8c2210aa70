#include "pending.h"

#include <algorithm>

#include "model.h"

namespace moe {

void pending::submit(moe_model & model) {
    auto & entries = model.dialogue.entries;
    for (dialogue::entry & e : entries) {
        if (e.load && !e.submitted && (e.waits_for < 0 || entries[e.waits_for].done)) {
            model.load(e.slot, model.weights.key_of(e.copy, model.dialogue.call.layer, e.expert), false);
            e.submitted = true;
        }
    }
}

// Where a read waits for a slot, those in such slots go first, and without one only about as many are
// computed as are being read meanwhile: a long round would leave the disk without work.
bool pending::look(moe_model & model) {
    const auto & entries = model.dialogue.entries;
    bool         scarce  = model.dialogue.guesses_wait();
    any                  = false;
    there.clear();
    waiting.clear();
    for (size_t i = 0; i < entries.size(); i++) {
        const dialogue::entry & e       = entries[i];
        const bool              is_held = e.load && !e.submitted;
        scarce                          = scarce || is_held;
        any                             = any || !e.taken;
        if (e.taken || is_held) {
            continue;
        }
        const slot_state state = model.reads->state(e.slot);
        if (state == slot_state::FAILED) {
            model.failure.set(ERROR_READ, model.reads->last_error());
            return false;
        }
        if (state == slot_state::LOADING) {
            waiting.push_back(e.slot);
        } else {
            there.push_back((int)i);
        }
    }
    most = there.size();
    if (scarce) {
        const auto rest = std::stable_partition(there.begin(), there.end(), [&](int i) { return entries[i].awaited; });
        most            = rest > there.begin() ? rest - there.begin() : std::max<size_t>(1, waiting.size());
    }
    return true;
}

}  // namespace moe
