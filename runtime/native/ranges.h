// An event in pieces, on a device: its chain of nodes rebuilt over some of its tokens at a time, and the
// memory that takes.
//
// The allocation of a graph lets a chain's output lie on top of its inputs, and of what the tokens of a
// later piece still compute. So inputs are copied first, on the device, what is in between lies in memory
// of its own, and only the output is written in its place.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "chain.h"
#include "ggml-iface.h"
#include "graph_memory.h"

namespace moe {

class ranges {
  public:
    explicit ranges(ggml_backend_t stream) : stream_(stream) {}
    ~ranges();
    ranges(const ranges &)             = delete;
    ranges & operator=(const ranges &) = delete;

    // Ids of an event on the device, so many and twice: slots and experts. Throws std::bad_alloc.
    ggml_tensor * slots(int n_used, int n_tokens);
    // Copies them there: read when the stream gets to it.
    void send(const int32_t * slots, const int32_t * experts, int first, int last);
    // Whether they lie elsewhere than at first: a launch that a device remembers does not know.
    bool has_moved() const { return first_ids_ && ggml_backend_buffer_get_base(ids_.buffer) != first_ids_; }

    // What does not depend on a matmul, and a copy of what the pieces read.
    ggml_status keep(const chain & c);
    // Tokens [first, last) of it, with weights as `weight` has them.
    ggml_status run(const chain & c, int first, int last, const std::function<ggml_tensor *(const ggml_tensor *)> & weight);

  private:
    struct memory {
        ggml_backend_buffer_t buffer = nullptr;
        size_t                used   = 0;
    };
    using built = std::vector<std::pair<const ggml_tensor *, ggml_tensor *>>;

    void                 reserve(memory & m, size_t bytes);
    void                 put(memory & m, ggml_tensor * t);
    ggml_tensor *        clone(const ggml_tensor * t, int64_t n_tokens);
    void                 add(ggml_cgraph * graph, const ggml_tensor * of, ggml_tensor * node);
    ggml_tensor *        number(ggml_tensor & of, int first, int last);
    ggml_tensor *        source(const chain & c, const ggml_tensor * s, int first, int last);
    static ggml_tensor * find(const built & in, const ggml_tensor * t);

    ggml_backend_t           stream_;
    graph_memory             meta_{6};
    memory                   ids_, inputs_, between_;
    const void *             first_ids_ = nullptr;
    ggml_tensor              slots_{}, experts_{};
    std::vector<ggml_tensor> kept_tensors_;
    built                    kept_, built_;
};

}  // namespace moe
