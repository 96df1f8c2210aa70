// Activations, in whatever memory the inner device computes on: the expert ids, and rows of float32 that
// are kept, gathered by (token, rank) pair and scattered back. All else only passes tensors on.
#pragma once

#include <vector>

#include "buffer.h"

namespace moe {

// One per kind of memory; one of each per backend, because it owns what it hands out.
class rows {
  public:
    virtual ~rows() = default;

    enum lifetime {
        EVENT = 0,  // inputs of one event: rounds overwrite the graph's memory
        ROUND,      // activations of one round
    };
    // Room for so many bytes of that lifetime; what was there is forgotten. Throws std::bad_alloc.
    virtual void reserve(lifetime life, size_t bytes) = 0;
    // Gives a contiguous tensor its memory, of what was reserved.
    virtual void put(lifetime life, ggml_tensor * t) = 0;
    // Bytes of memory held by now.
    virtual size_t bytes() const = 0;
    // What put() takes for so many bytes.
    static size_t padded(size_t bytes) { return buffer::padded(bytes); }

    // Expert ids [n_tokens][n_used], to the host.
    virtual void ids(const ggml_tensor * t, int32_t * out) = 0;
    // From a tensor of contiguous rows to a contiguous one of the same shape.
    virtual void copy(const ggml_tensor * from, ggml_tensor * to) = 0;
    // The rows of `pairs`, numbered token * n_used + rank, in their order. `from` is [ne0, n_used or 1,
    // n_tokens], `to` contiguous with a row per pair; scatter is the way back.
    virtual void gather(const ggml_tensor * from, const std::vector<int32_t> & pairs, int n_used, ggml_tensor * to)  = 0;
    virtual void scatter(const ggml_tensor * from, const std::vector<int32_t> & pairs, int n_used, ggml_tensor * to) = 0;
};

// In this process's memory, where ggml-cpu's activations are.
class host_rows : public rows {
  public:
    // Part of a round's memory, for rows of another thread.
    char * take(size_t bytes) { return memory_[ROUND].take(bytes); }
    void   borrow(char * memory, size_t bytes) { memory_[ROUND].borrow(memory, bytes); }

    void   reserve(lifetime life, size_t bytes) override { memory_[life].reserve(bytes); }
    void   put(lifetime life, ggml_tensor * t) override;
    size_t bytes() const override { return memory_[EVENT].capacity() + memory_[ROUND].capacity(); }
    void   ids(const ggml_tensor * t, int32_t * out) override;
    void   copy(const ggml_tensor * from, ggml_tensor * to) override;
    void   gather(const ggml_tensor * from, const std::vector<int32_t> & pairs, int n_used, ggml_tensor * to) override;
    void   scatter(const ggml_tensor * from, const std::vector<int32_t> & pairs, int n_used, ggml_tensor * to) override;

  private:
    buffer memory_[2];
};

}  // namespace moe
