// What of a running event can be computed next, and what keeps the rest. One thread at a time.
#pragma once

#include <cstddef>
#include <vector>

struct moe_model;

namespace moe {

class pending {
  public:
    // Starts the reads of an event whose slots are free: at first, and whenever experts of it are done.
    static void submit(moe_model & model);
    // Looks what has come by now; false when a read has failed.
    bool look(moe_model & model);

    std::vector<int> there;    // entries to compute, in the plan's order, but those in slots that a read waits for first
    std::vector<int> waiting;  // slots that are being read
    size_t           most;     // of the entries there: how many before looking again is due
    bool             any;      // are left that nobody has taken, there or not
};

}  // namespace moe
