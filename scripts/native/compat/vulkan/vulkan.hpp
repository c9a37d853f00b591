// The system's vulkan.hpp and, where its Vulkan headers are older than 1.3.272 (Debian 12, Ubuntu
// 22.04), the few types of VK_EXT_layer_settings that ggml-vulkan.cpp names. They reach the driver
// only as one more structure in a chain, which a driver that does not know it skips.
#pragma once
#pragma GCC system_header

#include_next <vulkan/vulkan.hpp>

#ifndef VK_EXT_layer_settings
#    include <cstdint>
#    include <vector>

namespace vk {

enum class LayerSettingTypeEXT { eBool32 = 0 };

struct LayerSettingEXT {
    const char *        pLayerName;
    const char *        pSettingName;
    LayerSettingTypeEXT type;
    uint32_t            valueCount;
    const void *        pValues;
};

struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & settings) :
        settingCount(static_cast<uint32_t>(settings.size())),
        pSettings(settings.data()) {}

    VkStructureType         sType = static_cast<VkStructureType>(1000496000);
    const void *            pNext = nullptr;
    uint32_t                settingCount;
    const LayerSettingEXT * pSettings;
};

}  // namespace vk
#endif
