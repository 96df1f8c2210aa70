// Experts in the memory of a device: a pool of slots per layer, filled from host memory by a stream of its
// own, beside the ones that compute.
//
// A pool is laid out as the layer's own tensors are, [ne0, ne1, n_slots] each: any mix of types, no stride
// that a kernel might not like, and with a slot for every expert it is the stock tensor. Owns that memory,
// the stream and its events. Which expert is where, it remembers and does not decide.
//
// Beside them there may be windows: room for all experts of any one layer, each in the slot of its number,
// for an event that wants more of them than its pool has slots, until another layer needs it. Layers that follow
// each other take them in turn, so that with two the next layer's fills while one is computed on.
//
// Copies are noted and handed to the stream together, so that neighbours go in one call (copies.h). A ticket is
// the number of such a group in the order of the stream. Whoever computes on a slot has its own
// stream wait for the slot's ticket; whoever writes over what a copy reads waits for it, or for its stream
// to have waited.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "copies.h"
#include "ggml-iface.h"
#include "weights.h"

namespace moe {

class pools {
  public:
    pools(const weights & w, ggml_backend_dev_t device);
    ~pools();
    pools(const pools &)             = delete;
    pools & operator=(const pools &) = delete;

    // By layer, how many slots, and how many windows; once, before anything else. False when the device refuses.
    bool allocate(const int32_t * n_slots, int n_windows);
    bool is_allocated() const { return !tensors_.empty(); }
    // Whether the layer is computed on the device at all.
    bool has(int layer) const { return n_slots(layer) > 0; }
    int  n_slots(int layer) const { return slots_[layer].size(); }
    // Whether each expert has the slot of its own number, for good: nobody need ask which they are.
    bool is_whole(int layer) const { return n_slots(layer) == weights_.n_experts; }
    // What a layer's weight is there, and what it is in the layer's window.
    ggml_tensor * tensor(const moe_tensor & weight) { return &tensors_[weights_.index_of(weight)]; }
    bool          has_window() const { return !windows_.empty(); }
    ggml_tensor * window(const moe_tensor & weight) { return &window_of(weight.layer).tensors[weights_.index_of(weight)]; }
    // Whether one layer's window may be filled while the other's is computed on.
    bool are_apart(int layer, int other) const { return has_window() && turn_[layer] != turn_[other]; }

    // The key a slot holds, or will before any stream that waits for its ticket goes on; -1: none.
    int     key_of(int layer, int slot) const { return slots_[layer][slot].key; }
    int64_t ticket_of(int layer, int slot) const { return slots_[layer][slot].ticket; }
    void    forget(int layer, int slot);
    // Where a key is, or -1.
    int slot_of(int key) const { return where_[key]; }
    // An expert's matrices are to be copied, of which `memory` is the slot in host memory; its ticket, that
    // nobody waits for before it is issued.
    int64_t upload(int layer, int slot, int key, const char * memory);
    // Likewise into the window.
    int64_t upload_to_window(int key, const char * memory);
    // What a slot of a pool holds is to be copied into the window, behind the uploads noted so far.
    void copy_to_window(int layer, int slot);
    // Likewise at once, by a stream that waited for the slot.
    void copy_to_window(ggml_backend_t stream, int layer, int slot);
    // What the window holds is to be copied into a slot of the pool.
    void keep_from_window(int layer, int slot, int key);
    // All that the layer's pool holds was copied there, by a stream that waited for the slots.
    void hold_in_window(int layer);
    // The layer's window is its own from now on; the ticket of what may still come there for another one.
    int64_t begin_window(int layer);
    // Whether a key is there, or will be before any stream that waits for the window's ticket goes on.
    bool    is_in_window(int key) const;
    int64_t window_ticket(int layer) const { return window_of(layer).ticket; }
    // Hands over what has been noted; to be called once something was.
    void issue();
    // Whether copies that lie evenly apart go in one call.
    void join(bool on) { joins_ = on; }

    // How long it takes to copy so many experts, one after the other, into a pool that holds nothing, in nanoseconds.
    int64_t copy_ns(int layer, int n, const std::function<const char *(int)> & memory);

    // A stream waits on the device for a copy and all before it.
    void wait_on(ggml_backend_t stream, int64_t ticket);
    // The copies to come wait for what that stream was told to do so far.
    void wait_for(ggml_backend_t stream);
    // This thread waits for a copy, unless it is known to be done.
    void settle(int64_t ticket);
    // Copies up to this one are known to be done.
    void done(int64_t ticket) { done_ = ticket > done_ ? ticket : done_; }

    int64_t n_bytes() const { return buffer_ ? (int64_t)ggml_backend_buffer_get_size(buffer_) : 0; }
    struct counters {
        int64_t uploads, bytes;
    } count{};

  private:
    struct slot {
        int     key    = -1;
        int64_t ticket = 0;
    };

    // An upload that is noted.
    struct upload_due {
        const std::vector<ggml_tensor> * to;
        int                              layer, slot;
        const char *                     memory;
    };
    // A copy within the device that is noted.
    struct exchange {
        int  layer, slot;
        bool to_window;
    };
    struct window_room {
        std::vector<ggml_tensor> tensors;  // by index of the weight
        ggml_backend_buffer_t    buffer = nullptr;
        int                      layer  = -1;  // whose experts it holds
        std::vector<char>        holds;        // which
        int64_t                  ticket = 0;   // of the last copy from host memory
    };

    void note(const std::vector<ggml_tensor> & to, int layer, int slot, const char * memory) { due_.push_back({&to, layer, slot, memory}); }
    void hold(int layer, int slot, int key);
    size_t neighbours(size_t first) const;
    void   add(const upload_due & u, const moe_tensor & weight);
    void   send();
    void   copy(ggml_backend_t stream, const exchange & x);

    window_room &        window_of(int layer) { return windows_[turn_[layer]]; }
    const window_room &  window_of(int layer) const { return windows_[turn_[layer]]; }
    bool                 place(std::vector<ggml_tensor> & tensors, const int32_t * n_slots, bool stacked, ggml_backend_buffer_t & buffer);
    ggml_backend_event_t event_of(int64_t ticket) const { return events_[ticket % events_.size()]; }

    const weights &                   weights_;
    ggml_backend_dev_t                device_;
    ggml_backend_t                    stream_ = nullptr;
    std::vector<ggml_backend_event_t> events_;  // of the latest tickets; none where the device has none
    ggml_backend_event_t              before_ = nullptr;
    ggml_backend_buffer_t             buffer_ = nullptr;
    std::vector<ggml_tensor>          tensors_;  // by index of the weight
    std::vector<window_room>          windows_;
    std::vector<int>                  turn_;   // layer -> number of its window
    std::vector<int>                  where_;  // key -> slot
    std::vector<std::vector<slot>>    slots_;  // by layer
    std::vector<upload_due>           due_;
    std::vector<exchange>             exchanges_;  // behind those
    copies                            copies_;
    bool                              joins_  = true;
    int64_t                           issued_ = 0, done_ = 0;
};

}  // namespace moe
