// Computes an event of many experts on all of the inner backend's threads, each of which computes whole
// experts by itself, as their reads complete.
//
// ggml divides each matmul among its threads and has them meet behind it, several times per expert: a
// thread that comes late, because the system needed its processor for a read or took it for somebody else,
// holds up all of them each time. Here they meet once per layer. Bits do not depend on who computes a row.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "chain.h"
#include "dialogue.h"
#include "graph.h"
#include "graph_memory.h"
#include "pending.h"
#include "rows.h"

namespace moe {

class expert_threads {
  public:
    // Activations are part of `memory`'s of a round.
    expert_threads(ggml_backend_t inner, rows & memory);
    ~expert_threads();
    expert_threads(const expert_threads &)             = delete;
    expert_threads & operator=(const expert_threads &) = delete;

    // Whether an event has enough experts to keep all threads at work, in so much memory.
    static bool suit(const chain & c, int64_t most_bytes);
    // Of an event whose inputs are kept in `inputs` and whose first reads are submitted.
    ggml_status run(const chain & c, const graphs & inputs);

  private:
    struct thread;

    void        work(int number);
    void        wait(int number, std::unique_lock<std::mutex> & lock, int64_t ended);
    ggml_status compute(thread & t, const dialogue::entry & e);
    void        prepare(const graphs & inputs);

    ggml_backend_t                       inner_;
    rows &                               memory_;
    std::vector<std::unique_ptr<thread>> threads_;
    graph_memory                         meta_{1};
    ggml_cgraph *                        graph_  = nullptr;  // one node: work() on every thread
    int32_t                              output_ = 0;        // of that node, which needs one
    // Of the running event, under the lock.
    std::mutex              mutex_;
    std::condition_variable done_;  // an expert, or all is lost
    const chain *           c_ = nullptr;
    pending                 next_;
    ggml_status             status_     = GGML_STATUS_SUCCESS;
    int64_t                 waited_ns_  = 0;  // of all threads
    int64_t                 n_computed_ = 0;
};

}  // namespace moe
