// Everything that is not a routed expert: read by name from its file into the memory that llama.cpp
// computes on, through three buffer types: the CPU's own memory, ggml-cpu's repacked layout of it, and a
// device's memory.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "buffer_type.h"
#include "failure.h"

namespace moe {

class proxy;

class trunk {
  public:
    // `where`: the device, or null.
    trunk(const moe_config & config, int api_version, proxy * where, failure & why);
    ~trunk();

    buffer_type plain, repacked, on_device;

    // Fills a tensor from its file; false when it is not of this model.
    bool read(ggml_tensor * tensor);
    // Likewise where the tensor is in the device's memory.
    bool read_to_device(ggml_backend_buffer_t buffer, ggml_tensor * tensor);
    // The memory itself of buffers on the device.
    ggml_backend_buffer_t      allocate_on_device(size_t bytes);
    ggml_backend_buffer_type_t memory_of_device() const;
    // Where that tensor lies now; nullptr if it is unknown, not loaded, repacked or on a device.
    const void * data(const char * name) const;
    // A model is about to be loaded: nothing lies anywhere.
    void forget();

  private:
    int  read_rows(const moe_trunk_tensor & t, ggml_tensor * tensor) const;
    void report(const moe_trunk_tensor & t, int error);

    std::vector<std::string>             paths_;
    std::vector<moe_trunk_tensor>        tensors_;
    std::unordered_map<std::string, int> by_name_;
    std::vector<const void *>            data_;
    proxy *                              device_;
    failure &                            why_;
};

}  // namespace moe
