// Memory that is filled and emptied every event and allocated almost never.
#pragma once

#include <new>

#include "ggml.h"
#include "os.h"

namespace moe {

class buffer {
  public:
    buffer()                           = default;
    buffer(const buffer &)             = delete;
    buffer & operator=(const buffer &) = delete;
    ~buffer() { os::aligned_free(data_); }

    // Contents are lost.
    void reserve(size_t bytes) {
        used_ = 0;
        if (bytes <= capacity_) {
            return;
        }
        os::aligned_free(data_);
        capacity_ = 0;
        data_     = (char *)os::aligned_alloc(ALIGN, bytes);
        if (data_ == nullptr) {
            throw std::bad_alloc();
        }
        capacity_ = bytes;
    }

    // Aligned for ggml's kernels; what was reserved must suffice.
    char * take(size_t bytes) {
        char * p = data_ + used_;
        used_ += padded(bytes);
        GGML_ASSERT(used_ <= capacity_);
        return p;
    }

    size_t        capacity() const { return capacity_; }
    static size_t padded(size_t bytes) { return (bytes + ALIGN - 1) & ~(ALIGN - 1); }

  private:
    static constexpr size_t ALIGN = 64;

    char * data_     = nullptr;
    size_t capacity_ = 0;
    size_t used_     = 0;
};

}  // namespace moe
