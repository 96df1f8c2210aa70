// The memory of all slots: where a read's bytes land, and what a weight looks like to the inner device
// once a graph's expert ids are slots. Knows nothing of which slot holds what.
#pragma once

#include <memory>
#include <vector>

#include "ggml-iface.h"
#include "weights.h"

namespace moe {

// One per kind of memory that an inner device computes on.
class arena {
  public:
    virtual ~arena() = default;

    // Once, before anything else; false when the system refuses.
    virtual bool allocate(int n_slots) = 0;
    // 0 until it is allocated.
    int n_slots() const { return n_slots_; }
    // Where a slot's byte at this offset is to be read to.
    virtual char * place(int slot, int64_t slot_offset) = 0;
    // Called by the lane that read a slot's last byte, before anyone is told: brings what was read
    // into the layout the inner device computes on.
    virtual void finish(int slot, int key) = 0;
    // Whether it is memory of the kind that was asked for: some devices give another without a word.
    virtual bool is_pinned() const = 0;
    // Makes `t` a weight's matrices of one copy, over all slots: type, shape, strides, memory, and
    // what the inner device wants to see in it.
    virtual void show(const moe_tensor & weight, int copy, ggml_tensor * t) const = 0;

  protected:
    int n_slots_ = 0;
};

// In this process's memory, for ggml-cpu and as the source of copies to a device. Throws std::runtime_error
// where the model is in a kernel layout that this machine does not have.
class host_arena : public arena {
  public:
    // `pinned`: what a device copies from directly, where it has such memory; else null.
    host_arena(const weights & w, ggml_backend_buffer_type_t pinned);
    ~host_arena() override;
    host_arena(const host_arena &)             = delete;
    host_arena & operator=(const host_arena &) = delete;

    bool   allocate(int n_slots) override;
    char * place(int slot, int64_t slot_offset) override { return memory_ + slot * weights_.slot_bytes + slot_offset; }
    void   finish(int slot, int key) override;
    void   show(const moe_tensor & weight, int copy, ggml_tensor * t) const override;
    bool   is_pinned() const override { return pinned_ != nullptr; }

  private:
    bool        allocate_pinned(size_t bytes);
    void        unpack_in_place(const moe_tensor & t, int copy, uint8_t * matrix) const;
    static void repack_in_place(const moe_tensor & t, int copy, uint8_t * matrix);

    const weights &            weights_;
    ggml_backend_buffer_type_t pinned_type_;
    ggml_backend_buffer_t      pinned_   = nullptr;
    char *                     memory_   = nullptr;
    ggml_backend_buffer_t      repacked_ = nullptr;  // the memory, as ggml-cpu has to see it where the layout is repacked
    std::vector<void *>        traits_;              // [tensor][copy] what it attaches to such a tensor; null: it is plain
};

}  // namespace moe
