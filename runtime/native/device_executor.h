// Computes one graph on a device whose pools may lack experts: cuts it in front of every layer that has to
// be asked, brings what is missing, and launches the nodes with their weights and ids replaced.
//
//   trunk     up to the next such layer, in one launch; layers with all experts in their pool are part of it
//   experts   from a layer's first expert matmul to its last: one wait for the ids, then one launch, with the trunk
//             behind it where nothing has to come between
//   window    an event of more experts than the pool has slots: all of them side by side, with the graph's ids;
//             with two windows the next layer's come meanwhile, as far as somebody foresees them
//   ranges    likewise without a window: as many tokens at a time as fit the pool
//
// Of experts that a pool lacks, those that a plan leaves to the processor are computed meanwhile (cpu_experts.h).
//
// Nodes are patched in place and restored after the launch, which has captured them by then. So a graph
// keeps its identity, and with it whatever the device knows of it: fused kernels, recorded launches.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "chain.h"
#include "cpu_experts.h"
#include "ggml-iface.h"
#include "moe.h"
#include "next_router.h"
#include "pinned.h"
#include "ranges.h"
#include "segments.h"
#include "windows.h"

namespace moe {

class device_executor {
  public:
    // The stream is not owned.
    device_executor(ggml_backend_t stream, moe_model & model);
    ~device_executor();
    device_executor(const device_executor &)             = delete;
    device_executor & operator=(const device_executor &) = delete;

    ggml_status compute(ggml_cgraph * graph);

  private:
    // Bits of a launch: which of a segment's uids is its.
    enum how { FROM_WINDOW = 1, WITH_TRUNK = 2, WITH_ROUTER = 4 };

    ggml_status launch(ggml_cgraph * graph, const segment & s, ggml_tensor * slots, const segment * behind = nullptr);
    ggml_status experts(ggml_cgraph * graph, const segment & s, const segment *& behind);
    ggml_status in_ranges();
    bool        fetch(ggml_tensor * const * nodes, int n);
    void        fetch_input(const ggml_tensor * x);
    int         fitting(int first);
    ggml_status event(int first, int last, const std::function<ggml_status()> & launch);
    void        use_slots(int first);
    void        wait_on(int64_t ticket);
    bool        bring(bool all);
    bool        compute_there();
    int32_t     unused_slot() const;
    bool        advance(bool & any);
    void        take_over();
    void        look_ahead();
    bool        tell();

    ggml_backend_t                 stream_;
    moe_model &                    model_;
    segments                       segments_;
    ranges                         ranges_;
    chain                          c_;  // the running event: what a dialogue wants to know of it
    next_router                    router_;
    chain                          whole_;            // all of the segment, where it goes in ranges
    ggml_tensor                    x_{};              // its input, in host memory
    pinned                         fetched_;          // ids as they lie on the device
    pinned                         inputs_;           // likewise x
    std::vector<int32_t>           ids_;              // [n_tokens][n_used] of the segment
    pinned                         slots_;            // likewise in the pool; read by the stream until it is next waited for
    bool                           wide_    = false;  // the event uses the window
    bool                           guesses_ = false;  // the event before wanted some: they are made from x
    bool                           asked_   = false;  // for guesses, in this event
    int                            passed_  = -1;     // number of the last event, if nobody was asked about it
    cpu_experts                    cpu_;
    windows                        windows_;
    bool                           has_inputs_ = false;  // of the segment, for the processor
    bool                           computes_   = false;  // the processor has begun with this event
    std::vector<dialogue::entry *> there_;               // for it, in host memory
    std::vector<int>               waiting_;             // slots in host memory
    std::vector<int32_t>           in_range_;            // expert -> number of the range that needs it
    int32_t                        range_  = 0;          // numbers all ranges
    int64_t                        waited_ = 0;          // the stream has been told to wait for copies up to this ticket
};

}  // namespace moe
