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
    ~buffer() { release(); }

    // Contents are lost.
    void reserve(size_t bytes) {
        used_ = 0;
        if (bytes <= capacity_) {
            return;
        }
        release();
        data_ = (char *)os::aligned_alloc(ALIGN, bytes);
        if (data_ == nullptr) {
            throw std::bad_alloc();
        }
        capacity_ = bytes;
    }

    // Somebody else's memory, until the next one or the end.
    void borrow(char * memory, size_t bytes) {
        release();
        data_     = memory;
        capacity_ = bytes;
        borrowed_ = true;
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

    void release() {
        if (!borrowed_) {
            os::aligned_free(data_);
        }
        data_     = nullptr;
        capacity_ = used_ = 0;
        borrowed_         = false;
    }

    char * data_     = nullptr;
    size_t capacity_ = 0;
    size_t used_     = 0;
    bool   borrowed_ = false;
};

}  // namespace moe
