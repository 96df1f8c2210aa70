// Computes one split of expert operations on an inner ggml device, over slots instead of the
// weights the graph names.
//
// All arithmetic is the inner device's own: the split's nodes are rebuilt with two substitutions.
// A weight [ne0, ne1, n_experts] becomes the arena seen as one tensor [ne0, ne1, n_slots] (stride:
// one slot), and expert ids become slot ids. MUL_MAT_ID computes each (token, rank) pair by itself,
// so any grouping of pairs gives stock's bits as long as an expert's pairs stay together and in
// token order (ggml picks kernels by the number of rows per expert).
//
//   whole   every expert is resident: the original nodes and geometry in one graph
//   rounds  the resident experts' pairs first, then those of each expert as its read completes;
//           experts in their smaller copy have rounds of their own
#pragma once

#include <vector>

#include "buffer.h"
#include "chain.h"
#include "model.h"

namespace moe {

// Limit on each of the two buffers that grow with pairs: ggml-cpu's table of rows
// (n_slots * pairs * 8 bytes) and the gathered activations. runtime/budget.py counts both.
constexpr int64_t WORK_BYTES = 32 << 20;

// Batches of more tokens are guessed for at once: their computing takes long enough to hide it. An
// amount of work, whatever the phase.
constexpr int GUESS_FIRST_TOKENS = 8;

class executor {
  public:
    explicit executor(ggml_backend_t inner) : inner_(inner) {}
    ~executor();
    ggml_status compute(ggml_cgraph * graph);

  private:
    // One expert of the running event, in execution order.
    struct entry {
        int  expert;
        int  copy;
        int  slot;
        int  first;  // its pairs are pairs_[first .. first + count)
        int  count;
        int  waits_for;  // index of the entry that must free the slot first, or -1
        bool load;
        bool submitted;
        bool done;
    };

    ggml_status   run_plain(ggml_tensor * const * nodes, int n);
    ggml_status   run_chain();
    bool          group_pairs();
    bool          ask();
    bool          plan_settled();
    bool          read_plan();
    bool          read_guesses();
    void          drop_wrong_guesses();
    void          submit_ready_loads();
    ggml_status   run_entries();
    ggml_status   run_whole();
    ggml_status   run_round(const std::vector<int> & chosen, int copy);
    ggml_status   keep_inputs();
    ggml_status   submit(ggml_cgraph * graph);
    void          record(int kind, int64_t start_ns);  // on the timeline, for the running layer
    ggml_cgraph * begin(size_t n_nodes);
    ggml_tensor * clone(const ggml_tensor * t, int64_t ne1, int64_t ne2, void * data);
    ggml_tensor * slot_view(const ggml_tensor * weight, int copy);
    ggml_tensor * rows_of(const ggml_tensor * input, const std::vector<int32_t> & pairs, int64_t ne1, int64_t ne2);

    ggml_backend_t                                           inner_;
    ggml_context *                                           meta_       = nullptr;  // tensor and graph structs of one inner graph
    size_t                                                   meta_nodes_ = 0;
    buffer                                                   scratch_;  // activations of one round
    buffer                                                   kept_;     // inputs of one event: rounds overwrite the graph's memory
    chain                                                    c_;
    std::vector<int32_t>                                     ids_;       // [n_tokens][n_used]
    std::vector<int32_t>                                     index_of_;  // expert -> index in call.experts; -1 between events
    std::vector<int32_t>                                     first_of_;  // index -> first pair
    std::vector<int32_t>                                     pairs_;     // token * n_used + rank, grouped by expert, in token order
    std::vector<entry>                                       entries_;
    std::vector<int32_t>                                     occupant_;  // slot -> last entry planned for it; -1 between events
    std::vector<int>                                         ready_, waiting_;
    std::vector<int32_t>                                     dropped_;
    std::vector<int32_t>                                     round_pairs_, round_slots_, round_experts_;
    std::vector<std::pair<const ggml_tensor *, ggml_tensor>> copies_;  // of c_.inputs
};

}  // namespace moe
