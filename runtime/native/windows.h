// What a device's windows hold: for an event of more experts than its layer's pool has slots what the pool has,
// and meanwhile, with a second window, what the next such layer will probably ask for.
//
// A prompt, or a step of many sequences, asks for nearly every expert of every layer. So the link need not wait
// until it is known which. Owns nothing: the rooms are the pools', the guess is the controller's.
#pragma once

#include <cstdint>
#include <functional>

#include "ggml-iface.h"
#include "spread.h"

struct moe_model;

namespace moe {

class windows {
  public:
    // `wait_on`: the stream waits for copies up to a ticket.
    windows(ggml_backend_t stream, moe_model & model, std::function<void(int64_t)> wait_on);

    // An event of that layer is about to fill its window.
    void begin(int layer);
    // What the pool has of that event's experts; by the stream that computes, so that copies from host memory go
    // on meanwhile.
    void copy_resident();
    // After the launch that computes on a window: starts filling the next one with what the call foresees.
    void fill_next();

  private:
    bool    is_lacking(int layer, int key) const;
    void    copy_pooled(int layer, const int32_t * keys, int n);
    int64_t last_ticket(int layer) const;

    ggml_backend_t               stream_;
    moe_model &                  model_;
    std::function<void(int64_t)> wait_on_;
    spread                       spread_;
};

}  // namespace moe
