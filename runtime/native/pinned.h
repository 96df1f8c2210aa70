// A little host memory that a stream copies to and from without a stop: pinned where the device offers
// that, plain otherwise. Copies of pageable memory may wait for all the stream has to do before.
//
// Owns the memory; whoever lets it grow sees to it that no copy is under way.
#pragma once

#include <cstddef>
#include <new>

#include "ggml-iface.h"

namespace moe {

class pinned {
  public:
    explicit pinned(ggml_backend_t stream) : stream_(stream) {}
    ~pinned() { release(); }
    pinned(const pinned &)             = delete;
    pinned & operator=(const pinned &) = delete;

    // Room for at least so many bytes; what was there is lost when it grows.
    void resize(size_t bytes) {
        if (bytes <= size_) {
            return;
        }
        release();
        ggml_backend_buffer_type_t type = ggml_backend_dev_host_buffer_type(ggml_backend_get_device(stream_));
        size_                           = 0;
        buffer_                         = ggml_backend_buft_alloc_buffer(type ? type : ggml_backend_cpu_buffer_type(), 2 * bytes);
        if (buffer_ == nullptr) {
            throw std::bad_alloc();
        }
        size_ = 2 * bytes;
    }
    template <class T = char>
    T * data() const {
        return buffer_ ? (T *)ggml_backend_buffer_get_base(buffer_) : nullptr;
    }

  private:
    void release() {
        if (buffer_) {
            ggml_backend_buffer_free(buffer_);
            buffer_ = nullptr;
        }
    }

    ggml_backend_t        stream_;
    ggml_backend_buffer_t buffer_ = nullptr;
    size_t                size_   = 0;
};

}  // namespace moe
