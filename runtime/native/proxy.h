// A ggml device as llama.cpp is given it in place of the real one: the same memory, the same streams, and
// a buffer type more, that of experts. Its backends cut graphs where experts have to be brought first
// (device_executor.h); all else is the real device's.
//
// A device of type GPU, not an accelerator beside one: the scheduler then makes of a graph what it makes
// of it without us, and copies no activation. Owns the tables; knows no slot.
#pragma once

#include "buffer_type.h"
#include "ggml-iface.h"

struct moe_model;

namespace moe {

class proxy {
  public:
    // Throws std::runtime_error where there is no device of that name.
    proxy(const char * name, int api_version, moe_model & model);
    proxy(const proxy &)             = delete;
    proxy & operator=(const proxy &) = delete;

    const ggml_backend_dev_t real;
    // Marks a tensor as ours, and computed on this device.
    buffer_type experts;

    ggml_backend_dev_t         ggml() { return &device_; }
    ggml_backend_buffer_type_t memory() const { return ggml_backend_dev_buffer_type(real); }
    moe_model &                model() { return model_; }

    static proxy & of(ggml_backend_dev_t device) { return *(proxy *)device->context; }
    static bool    is_expert_type(ggml_backend_buffer_type_t buft);

  private:
    moe_model &         model_;
    ggml_backend_device device_;
};

}  // namespace moe
