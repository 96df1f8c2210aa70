// Activations in this process's memory: the expert ids, and rows of float32 that are kept, gathered by
// (token, rank) pair and scattered back.
#pragma once

#include <vector>

#include "buffer.h"

namespace moe {

// One of each per backend, or thread of it, because it owns what it hands out.
class rows {
  public:
    enum lifetime {
        EVENT = 0,  // inputs of one event: rounds overwrite the graph's memory
        ROUND,      // activations of one round
    };
    // Room for so many bytes of that lifetime; what was there is forgotten. Throws std::bad_alloc.
    void reserve(lifetime life, size_t bytes) { memory_[life].reserve(bytes); }
    // Gives a contiguous tensor its memory, of what was reserved.
    void put(lifetime life, ggml_tensor * t);
    // Part of a round's memory, for the rows of a thread, which do not own it.
    char * take(size_t bytes) { return memory_[ROUND].take(bytes); }
    void   borrow(char * memory, size_t bytes) { memory_[ROUND].borrow(memory, bytes); }
    // Bytes of memory held by now.
    size_t bytes() const { return memory_[EVENT].capacity() + memory_[ROUND].capacity(); }
    // What put() takes for so many bytes.
    static size_t padded(size_t bytes) { return buffer::padded(bytes); }

    // Expert ids [n_tokens][n_used].
    static void ids(const ggml_tensor * t, int32_t * out);
    // From a tensor of contiguous rows to a contiguous one of the same shape.
    static void copy(const ggml_tensor * from, ggml_tensor * to);
    // The rows of `pairs`, numbered token * n_used + rank, in their order. `from` is [ne0, n_used or 1,
    // n_tokens], `to` contiguous with a row per pair; scatter is the way back.
    static void gather(const ggml_tensor * from, const std::vector<int32_t> & pairs, int n_used, ggml_tensor * to);
    static void scatter(const ggml_tensor * from, const std::vector<int32_t> & pairs, int n_used, ggml_tensor * to);

  private:
    buffer memory_[2];
};

}  // namespace moe
