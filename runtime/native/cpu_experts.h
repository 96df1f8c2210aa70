// Some (token, rank) pairs of a device's event, computed by the processor from slots in host memory beside
// what the device computes.
//
// The layer's chain of nodes is rebuilt over host memory: its inputs are brought with the ids, biases and
// scales once; a pair's row of the down projection then goes into its place in the device's output, behind
// what the device was told to compute there. So each row is computed wholly by one side, and what weights
// and sums them is stock's. Owns that memory; which experts, it is told.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "chain.h"
#include "dialogue.h"
#include "graph.h"
#include "pinned.h"
#include "rows.h"

namespace moe {

class cpu_experts {
  public:
    // Of the stream that computes the rest; not owned.
    explicit cpu_experts(ggml_backend_t stream) : stream_(stream), inputs_(stream), results_(stream) {}
    ~cpu_experts();
    cpu_experts(const cpu_experts &)             = delete;
    cpu_experts & operator=(const cpu_experts &) = delete;

    // Starts bringing the inputs of a layer's chain, which is not computed yet, to the host: they are there
    // when the stream has been waited for. False for one that only the device can compute.
    bool prepare(const chain & c);
    // One of these inputs; null where it is none.
    const char * input(const ggml_tensor * t) const;
    // Before the first of these experts of an event, when the stream has been waited for.
    bool begin(const int32_t * ids);
    // Computes the pairs of these entries.
    ggml_status compute(const std::vector<dialogue::entry *> & entries);
    // Sends what was computed since begin() to the device, once the device's part is launched.
    void send();

  private:
    ggml_tensor * copy(const ggml_tensor * t);
    ggml_tensor * constant(const ggml_tensor * t);
    ggml_tensor * twin_of(const ggml_tensor * t) const;
    bool          take_inputs(const chain & c);
    bool          take_before(const chain & c);
    bool          take_nodes(const chain & c);
    bool          start();

    ggml_backend_t                                         stream_;
    ggml_backend_t                                         inner_ = nullptr;  // the processor; from the first use on
    rows                                                   rows_;
    std::unique_ptr<graphs>                                graphs_;
    pinned                                                 inputs_, results_;
    chain                                                  c_;                 // over host memory
    const ggml_tensor *                                    output_ = nullptr;  // on the device
    ggml_tensor                                            ids_{};
    std::deque<ggml_tensor>                                tensors_;
    std::unordered_map<const ggml_tensor *, ggml_tensor *> twins_;
    std::unordered_map<const void *, std::vector<char>>    constants_;  // by where they are on the device
    graphs::round                                          round_;
    std::vector<int32_t>                                   pairs_;  // computed and not sent
};

}  // namespace moe
