// Copies all that a layer's pool holds into its window in one launch, instead of a call for every matrix of every
// expert: by the device's SET_ROWS, to which each matrix is a row of floats. Whether the device keeps every bit of
// what it takes for floats is tried once.
#pragma once

#include <cstdint>

#include "ggml-iface.h"
#include "graph_memory.h"
#include "pinned.h"

struct moe_model;

namespace moe {

class spread {
  public:
    spread(ggml_backend_t stream, moe_model & model) : stream_(stream), model_(model), experts_(stream), meta_(4) {}
    ~spread();
    spread(const spread &)             = delete;
    spread & operator=(const spread &) = delete;

    // For a layer whose slots all hold something that the stream waits for. False: the device cannot. To be called again
    // for a layer only when the stream has been waited for since.
    bool launch(int layer);

  private:
    bool          is_able();
    bool          keeps_bits();
    ggml_tensor * rows(enum ggml_type type, int64_t n, int64_t n_rows, ggml_backend_buffer_t buffer, void * data);
    ggml_tensor * numbers(int64_t n);

    ggml_backend_t        stream_;
    moe_model &           model_;
    int                   able_   = -1;       // not known yet
    ggml_backend_buffer_t buffer_ = nullptr;  // on the device: the expert that each slot holds
    pinned                experts_;           // by layer, the same in host memory
    graph_memory          meta_;
};

}  // namespace moe
