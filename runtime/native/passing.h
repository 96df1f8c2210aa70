// Events of a device that nobody is asked about: what they lack goes to slots that the controller has named
// before, and so does what is guessed after them.
//
// Asking takes longer than a layer computes, so the controller says beforehand what it would answer, and hears
// what became of it while the device computes. Owns the choice among what it named; decides nothing.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "moe.h"

namespace moe {

class passing {
  public:
    passing(moe_model & model, moe_call & call);
    passing(const passing &)             = delete;
    passing & operator=(const passing &) = delete;

    // Fills the plan of the call's event, of a layer whose pool has room for all it asks for; false: it must be asked
    // about. `asks` says of an expert whether the event asks for it.
    bool plan(const std::function<bool(int)> & asks);
    // Starts copying what was predicted after that event and leaves it in guess_keys and guess_pools.
    void copy_ahead();
    // A guess was copied into that slot, by whomever; its layer's next event is about to be planned, by others.
    void guessed(int layer, int pool) { guessed_[layer].push_back(pool); }
    void begin(int layer) { guessed_[layer].clear(); }
    // Nor is any: after a failure the controller looks what is where.
    void forget() { std::fill(guessed_.begin(), guessed_.end(), std::vector<int>()); }

  private:
    int  take_spare(int layer, bool demanded, const std::function<bool(int)> & is_needed);
    int  take_guess(int layer, const std::function<bool(int)> & is_needed);
    void choose(int layer);

    moe_model &                   model_;
    moe_call &                    call_;
    std::vector<int32_t>          spares_;
    std::vector<float>            chances_;
    std::vector<std::vector<int>> guessed_;  // by layer, slots of guesses that nobody has told of
    std::vector<int>              missing_;  // indices in call.experts
    std::vector<int>              chosen_;   // indices of predicted_keys
};

}  // namespace moe
