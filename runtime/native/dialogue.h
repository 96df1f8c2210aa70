// What is said between a model's events and its controller: which experts an event needs, the plan that
// answers, the guesses afterwards, and what becomes of an event that fails.
//
// Owns moe_call and what has to be remembered from one event to the next. A wrong plan would compute with
// wrong weights, so everything it claims is checked against the slots. Computes nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "chain.h"
#include "gates.h"
#include "passing.h"

namespace moe {

class dialogue {
  public:
    explicit dialogue(moe_model & model);
    dialogue(const dialogue &)             = delete;
    dialogue & operator=(const dialogue &) = delete;

    // One expert of the running event.
    struct entry {
        int  expert;
        int  copy;
        int  slot;
        int  first;  // its pairs are pairs[first .. first + count)
        int  count;
        int  waits_for;  // index of the entry that must free the slot first, or -1
        int  pool;       // its slot in the layer's pool on the device, where slot -1 means that it is there; -1 without one
        bool on_cpu;     // the processor computes it, of a device's event, and the pool has it afterwards
        bool load;
        bool submitted;
        bool taken;  // somebody computes it, or has
        bool done;
        bool awaited;  // another expert is to have its slot
    };

    // An event is begun once its `ids` are there, computed by whoever asks, and ended; nothing of it outlives the end. A false is
    // an event that has failed, with the reason in the model.
    bool begin(const chain & c);
    // Asks for guesses, now that the disk has what this layer waits for, and submits them. Once.
    bool ask_for_guesses();
    // Submits those that waited for a slot until its expert was computed.
    void submit_guesses();
    bool guesses_wait() const { return !waiting_.empty(); }
    // The input that guesses are made from has moved: rounds may write over the original.
    void input_moved(const ggml_tensor & x);
    void stalled(int64_t ns) { call.stall_ns += ns; }
    void end(bool failed);
    // After an event that nobody was asked about: copies what is guessed from its input, while that is still there.
    void look_ahead();
    // Tells of it. To be called while the device computes; false when the controller cannot go on.
    bool tell();
    int  n_events() const { return n_events_; }

    std::vector<int32_t> ids;      // [n_tokens][n_used]
    std::vector<int32_t> pairs;    // token * n_used + rank, grouped by expert, in token order
    std::vector<entry>   entries;  // the plan, in execution order

    void step(int phase, int n_sequences);

    moe_call     call{};
    moe_route_fn route = nullptr;
    moe_route_fn guess = nullptr;
    moe_route_fn told  = nullptr;
    moe_gates *  gates = nullptr;  // that guess for the model; not owned
    // Where the device has applied the next layer's router to call.x (moe_gates::next), as long as that is valid.
    const float * next_logits = nullptr;

  private:
    bool         group_pairs();
    void         remember_tensors();
    bool         ask();
    bool         plan_settled();
    bool         plan_passing();
    bool         read_plan();
    const char * read_entry(int i);
    bool         on_device() const;
    const char * read_pool(int i, int index);
    const char * read_slot(int i, int index);
    void         drop_wrong_guesses();
    bool         predict();
    bool         is_below(int key) const;
    bool         copy_ahead(int key, int slot, int pool);

    // A guess for a slot that the event still computes on.
    struct waiting {
        int key;
        int slot;
        int entry;  // the last one in that slot
    };

    moe_model &          model_;
    const chain *        c_ = nullptr;  // of the running event
    std::vector<int32_t> arrays_;
    std::vector<float>   chances_;
    std::vector<int64_t> settled_hits_;
    std::vector<int32_t> index_of_;  // expert -> index in call.experts; -1 between events
    std::vector<int32_t> first_of_;  // index -> first pair
    std::vector<int32_t> occupant_;  // slot -> last entry planned for it; -1 between events
    std::vector<int32_t> pooled_;    // slot of a pool -> event that took it last
    int32_t              n_events_ = 0;
    int64_t              ahead_ns_ = 0;  // when what was guessed after the last event could be copied; 0: it could not
    std::vector<int32_t> dropped_;
    std::vector<int32_t> abandoned_;
    std::vector<waiting> waiting_;
    passing              passing_;
    // Which tensors of which layer the running step has seen, to tell a continuation.
    int                             last_layer_ = -1;
    bool                            is_later_   = false;  // this event's layer comes after the last one's
    std::vector<const moe_tensor *> last_seen_;
};

}  // namespace moe
