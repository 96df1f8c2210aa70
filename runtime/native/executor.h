// Computes one split of expert operations on an inner ggml device, over slots instead of the weights
// the graph names; in which order, is decided here.
//
//   whole   every expert is resident: the original nodes and geometry in one graph
//   rounds  the resident experts' pairs first, then those of each expert as its read completes;
//           experts in their smaller copy have rounds of their own
//   threads many experts: each thread computes whole ones (expert_threads.h)
#pragma once

#include <vector>

#include "chain.h"
#include "expert_threads.h"
#include "graph.h"
#include "model.h"
#include "pending.h"
#include "rows.h"

namespace moe {

class executor {
  public:
    explicit executor(ggml_backend_t inner) : graphs_(inner, rows_), threads_(inner, rows_) {}
    ggml_status compute(ggml_cgraph * graph);

    // What an event of so many tokens may take, with every expert in a slot: by this class and by the
    // kernels it calls, beside the slots.
    static int64_t work_bytes(const weights & w, int n_used, int n_tokens);

  private:
    ggml_status run_nodes(ggml_tensor ** nodes, int n);
    ggml_status run_chain();
    ggml_status run_entries();
    ggml_status run_whole();
    ggml_status run_rounds(bool guessed);
    bool        is_whole() const;
    bool        find_ready();
    ggml_status run_ready();
    void        submit();
    void        wait_for_reads();

    rows                 rows_;
    graphs               graphs_;
    expert_threads       threads_;
    chain                c_;
    std::vector<int>     ready_;
    std::vector<int32_t> slot_of_;  // expert -> slot, in a whole event
    std::vector<int32_t> slots_;    // [n_tokens][n_used] likewise
    pending              next_;
    graphs::round        round_;
};

}  // namespace moe
