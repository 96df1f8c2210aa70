// What passed unasked on a device, on its way to the controller: a thread of the controller's own hears of it
// while the next layers are computed, since hearing takes longer than a layer.
//
// Owns the events between the two, in order. What the controller then leaves for a layer's next event is valid
// once it has heard of the last one: whoever uses it waits for that.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "moe.h"

struct moe_model;

namespace moe {

class telling {
  public:
    explicit telling(moe_model & model);
    telling(const telling &)             = delete;
    telling & operator=(const telling &) = delete;

    // ---- the thread that computes

    // Hands over an event, after the copies ahead. Here and in drain(): false, once, when the controller cannot go on,
    // and what it has not heard of then it never will.
    bool put(const moe_call & event);
    // Until all that was put is heard of.
    bool drain();
    // Until the last event of this layer is; false when the controller cannot go on, which drain() still says.
    bool wait(int layer);
    // Whether guesses are to be copied to the device, by what was heard last.
    bool may_copy() const { return may_copy_; }

    // ---- the thread that hears

    // Once it has heard of the event before, and how that went: waits for the next one, which `call` is then. False:
    // there will be none.
    bool next(bool went_well);
    // From any thread: next() returns.
    void end();

    moe_call call{};

    int64_t told_ns() const { return told_ns_; }
    int64_t waited_ns() const { return waited_ns_; }

  private:
    struct record {
        moe_call             call;
        std::vector<int32_t> numbers;
        std::vector<float>   chances;
    };

    bool take();
    template <class Condition>
    void wait_until(std::unique_lock<std::mutex> & lock, Condition met);

    moe_model &             model_;
    std::mutex              mutex_;
    std::condition_variable changed_;
    std::vector<record>     ring_;  // event n is ring_[n % size]
    std::vector<int64_t>    last_;  // by layer, the number of its last event
    const int64_t           at_once_;
    int64_t                 put_ = 0, told_ = 0;  // events
    bool                    is_telling_ = false, has_failed_ = false, has_ended_ = false;
    int64_t                 began_ns_ = 0;  // the event that is being told of
    std::atomic<bool>       may_copy_{false};
    std::atomic<int64_t>    told_ns_{0}, waited_ns_{0};
    std::vector<int32_t>    numbers_;  // what call's arrays are in
    std::vector<float>      chances_;
};

}  // namespace moe
