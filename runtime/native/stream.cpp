#include "stream.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace moe {

int64_t stream::read(void * out, size_t n) {
    const int64_t end = (int64_t)header_.size();
    if (position_ >= end) {
        memset(out, 0, n);  // read-ahead past the header: nobody looks at it
        n = (size_t)std::clamp<int64_t>(bytes_ - position_, 0, (int64_t)n);
    } else {
        n = (size_t)std::min<int64_t>((int64_t)n, end - position_);
        memcpy(out, header_.data() + position_, n);
    }
    position_ += (int64_t)n;
    return (int64_t)n;
}

int64_t stream::seek(int64_t offset, int whence) {
    const int64_t base = whence == SEEK_SET ? 0 : whence == SEEK_CUR ? position_ : bytes_;
    if (base + offset < 0) {
        return -1;
    }
    return position_ = base + offset;
}

}  // namespace moe
