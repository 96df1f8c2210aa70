// What llama.cpp takes for the model's file while it loads: a header, and behind it nothing.
//
// llama.cpp's plain loader would copy every expert through a staging buffer (about a second per
// GB) before set_tensor ignores it. Its mmap loader passes a pointer instead, and our two buffer
// types never look at it: the trunk is read by name. So the stream is opened in mmap mode over
// address space that only has the right size (os.h, open_stream).
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace moe {

class stream {
  public:
    // The header of a GGUF of `bytes` bytes.
    stream(std::vector<uint8_t> header, int64_t bytes) : header_(std::move(header)), bytes_(bytes) {}

    // As of a file: how many bytes came, 0 at the end.
    int64_t read(void * out, size_t n);
    // As fseek's arguments; the new position, or -1 for one before the beginning.
    int64_t seek(int64_t offset, int whence);

  private:
    std::vector<uint8_t> header_;
    int64_t              bytes_;
    int64_t              position_ = 0;
};

}  // namespace moe
