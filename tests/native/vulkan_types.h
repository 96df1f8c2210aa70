// Types of VK_EXT_layer_settings, which ggml's Vulkan module names and Vulkan's headers before 1.3.272 lack.
#pragma once
#if defined(__cplusplus) && __has_include(<vulkan/vulkan_core.h>)
#include <vulkan/vulkan_core.h>
#if !defined(VK_API_VERSION_1_4) && VK_HEADER_VERSION < 272
#include <cstdint>
#include <vector>

namespace vk {

enum class LayerSettingTypeEXT : int32_t { eBool32 = 0 };

struct LayerSettingEXT {
    const char *        layer;
    const char *        name;
    LayerSettingTypeEXT type;
    uint32_t            n_values;
    const void *        values;
};

struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & given)
        : n_settings((uint32_t)given.size()), settings(given.data()) {}
    int32_t                 type  = 1000496000;
    const void *            pNext = nullptr;
    uint32_t                n_settings;
    const LayerSettingEXT * settings;
};

}  // namespace vk
#endif
#endif
