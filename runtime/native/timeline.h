// What happened when, for looking at single tokens: a bounded ring of events, oldest overwritten.
// Off until a capacity is given; until then recording is one relaxed load and no clock is read.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "moe.h"
#include "os.h"

namespace moe {

class timeline {
  public:
    // Starts anew with room for this many events; 0 turns recording off and frees the ring.
    void resize(int capacity) {
        std::lock_guard<std::mutex> lock(mutex_);
        std::vector<moe_event>(capacity).swap(ring_);
        first_ = n_ = 0;
        on_.store(capacity > 0, std::memory_order_relaxed);
    }
    bool on() const { return on_.load(std::memory_order_relaxed); }
    // The start of an event, for add(); 0 while off, which add() ignores.
    int64_t start() const { return on() ? now_ns() : 0; }
    void    add(int kind, int lane, int key, int64_t start_ns) {
        if (start_ns == 0) {
            return;
        }
        const int64_t               end_ns = now_ns();
        std::lock_guard<std::mutex> lock(mutex_);
        if (ring_.empty()) {  // turned off since the event began
            return;
        }
        ring_[(first_ + n_) % ring_.size()] = {kind, lane, key, 0, start_ns, end_ns};
        if (n_ < ring_.size()) {
            n_++;
        } else {
            first_ = (first_ + 1) % ring_.size();
        }
    }
    // Moves the oldest events out, at most `capacity`, in the order in which they ended.
    int read(moe_event * out, int capacity) {
        std::lock_guard<std::mutex> lock(mutex_);
        const int                   n = (int)std::min<size_t>(n_, capacity);
        for (int i = 0; i < n; i++) {
            out[i] = ring_[(first_ + i) % ring_.size()];
        }
        first_ = ring_.empty() ? 0 : (first_ + n) % ring_.size();
        n_ -= n;
        return n;
    }

  private:
    std::atomic<bool>      on_{false};
    std::mutex             mutex_;
    std::vector<moe_event> ring_;
    size_t                 first_ = 0, n_ = 0;
};

}  // namespace moe
